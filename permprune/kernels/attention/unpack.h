/* Packed tokens as floats. Expects, inside BEGIN_TARGET and END_TARGET, these functions:
 *
 *     lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
 *         successive numbers at the ones of `bits`, and the lanes of `rest` elsewhere; may read LINE numbers
 *     void unpack_block(float *to, const char *from, const int number, uint64_t mask, const lanes *rest)
 *         the same for four lines; may read 64 numbers
 *     lanes flip(lanes values, uint32_t bits)
 *         negates the lanes at the ones of `bits`; this one and the two before only where HAS_BLOCKS is defined
 *     bytes look_up(const int8_t *table, bytes places)
 *         the entries of a table of LINE; not where HAS_CODED is defined
 *     void unpack_coded(float *to, const uint64_t *planes, const int bits, int64_t lines)
 *         up to four lines of the numbers whose bits stand in planes; only where HAS_CODED is defined
 *     uint64_t deposit(uint64_t bits, uint64_t places)
 *         successive bits at the ones of `places`; only where HAS_DEPOSIT is defined
 */
#if !defined(HAS_DEPOSIT)
static ALWAYS_INLINE uint64_t deposit(uint64_t bits, uint64_t places)
{
    uint64_t found = 0;
    for (; bits && places; places &= places - 1, bits >>= 1)
        found |= bits & 1 ? places & -places : 0;
    return found;
}
#endif

static ALWAYS_INLINE int64_t lines_of(int64_t width) { return (width + LINE - 1) / LINE * LINE; }

/* Eight bytes from `from` on. Near the end of an array, `inside` is 0, and those after `end` are zero. */
static ALWAYS_INLINE uint64_t read_bytes(const uint8_t *from, const uint8_t *end, const int inside)
{
    uint64_t word = 0;
    if (inside || end - from >= 8)
        memcpy(&word, from, sizeof word);
    else if (end > from)
        memcpy(&word, from, (size_t)(end - from));
    return word;
}

/* The mask of 64 channels from `channel` on. */
static ALWAYS_INLINE uint64_t read_mask(const struct states *states, int64_t token, int64_t channel, const int kind,
                                        const int inside)
{
    const int64_t left = states->width - channel;
    const uint64_t channels = left < 64 ? (1ull << left) - 1 : ~0ull;
    if (kind == EVERY)
        return channels;
    const uint8_t *code = states->code + token * states->code_bytes, *end = states->code + states->tokens * states->code_bytes;
    return channels & read_bytes(code + channel / 8, end, inside);
}

/* The signs of the channels that `mask` does not keep among 64, of which the first is number `pruned` of those. */
static ALWAYS_INLINE uint64_t read_signs(const struct states *states, int64_t token, int64_t pruned, uint64_t mask,
                                         const int inside)
{
    const uint8_t *from = states->signs + token * states->sign_bytes + pruned / 8;
    const uint8_t *end = states->signs + states->tokens * states->sign_bytes;
    uint64_t bits = read_bytes(from, end, inside);
    if (pruned % 8)
        bits = bits >> pruned % 8 | read_bytes(from + 8, end, 0) << 1 << (63 - pruned % 8);
    return deposit(bits, ~mask);
}

static ALWAYS_INLINE int keeps_as_many(const struct states *states, int64_t token)
{
    int64_t kept = 0;
    for (int64_t channel = 0; channel < states->width; channel += 64)
        kept += __builtin_popcountll(read_mask(states, token, channel, BITS, 0));
    return kept == states->kept;
}

/* Of integers in steps of one integer. */
static ALWAYS_INLINE float read_amplitude(const struct states *states, int64_t token, const int number)
{
    if (has_scale(number))
        return ((const uint8_t *)states->amplitude)[token] * 0.5f;
    return read_number(states->amplitude, token, number);
}

#if !defined(HAS_BLOCKS)
static ALWAYS_INLINE lanes flip(lanes values, uint32_t bits)
{
    const int_lanes places = {31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16};
    return (lanes)((int_lanes)values ^ (((int32_t)bits - (int_lanes){0}) << places & INT32_MIN));
}

static ALWAYS_INLINE void unpack_block(float *to, const char *from, const int number, uint64_t mask, const lanes *rest)
{
    UNROLLED for (int i = 0; i < 4; i++, mask >>= LINE) {
        lanes line = unpack_line(from, number, mask & 0xffff, rest[i]);
        memcpy(to + i * LINE, &line, sizeof line);
        from += __builtin_popcount(mask & 0xffff) * value_bytes(1, number);
    }
}
#endif

/* What pruned channels are read as. */
static ALWAYS_INLINE lanes recover(const float *level, float amplitude, uint64_t signs, const int kind)
{
    return kind == EVERY ? (lanes){0} : flip(load_line(level) * amplitude, signs & 0xffff);
}

/* The bits of 64 channels of a plane from byte `at` on, of the `left` bytes of it. */
static ALWAYS_INLINE uint64_t read_plane(const char *plane, int64_t left)
{
    uint64_t word = 0;
    memcpy(&word, plane, (size_t)smaller(left, 8));
    return word;
}

#if !defined(HAS_CODED)
static ALWAYS_INLINE void unpack_coded(float *to, const uint64_t *planes, const int bits, int64_t lines)
{
    typedef int8_t signed_bytes __attribute__((vector_size(LINE)));
    const bytes bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int64_t i = 0; i < lines; i++) {
        bytes number = {0};
        UNROLLED for (int plane = 0; plane < bits; plane++) {
            const uint8_t low = (uint8_t)(planes[plane] >> i * LINE), high = (uint8_t)(planes[plane] >> (i * LINE + 8));
            const bytes word = {low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
            number |= (bytes)((word & bit) != 0) & (uint8_t)(1 << plane);
        }
        if (bits <= 4)
            number = look_up(numbered[bits - 2], number);
        else
            number = number * (uint8_t)(1 << (8 - bits)) - (uint8_t)((1 << 7) - (1 << (7 - bits)));
        store_line(to + i * LINE, __builtin_convertvector((signed_bytes)number, lanes));
    }
}
#endif

/* Unpacks a token of numbers of few bits to lines_of(width) floats, in steps of one magnitude. */
static ALWAYS_INLINE void unpack_planes(const struct states *states, int64_t token, float *to, const int bits)
{
    const int64_t size = plane_bytes(states->width);
    const char *from = states->values + token * bits * size;
    for (int64_t at = 0; at < size; at += 8) {
        uint64_t planes[MOST_BITS];
        UNROLLED for (int plane = 0; plane < bits; plane++)
            planes[plane] = size - at >= 8 ? read_plane(from + plane * size + at, 8)
                                           : read_plane(from + plane * size + at, size - at);
        unpack_coded(to + at * 8, planes, bits, smaller((size - at) / 2, 4));
    }
}

static ALWAYS_INLINE int unpack_all(const struct states *states, int64_t first, int64_t count, float *to, const int bits)
{
    for (int64_t token = first; token < first + count; token++, to += lines_of(states->width))
        unpack_planes(states, token, to, bits);
    return 1;
}

/* Unpacks a token to lines_of(width) floats, with zeros after the width, in steps of one integer for integers. `level` has
 * as many. Returns 0 if a code keeps another number of channels than it should; the token becomes zero. */
static ALWAYS_INLINE int unpack_token(const struct states *states, int64_t token, const float *level, float *to,
                                      const int number, const int kind, const int inside)
{
    const int64_t stride = lines_of(states->width), length = value_bytes(states->kept, number);
    const char *values = states->values + token * length;
    char room[(WIDEST + 64) * 4];
    if (kind == BITS && __builtin_expect(!keeps_as_many(states, token), 0)) {
        memset(to, 0, (size_t)stride * sizeof *to);
        return 0;
    }
    if (!inside)
        values = memcpy(room, values, (size_t)length);
    const int recovers = kind != EVERY && states->amplitude != NULL;
    const float amplitude = recovers ? read_amplitude(states, token, number) : 0.0f;
    int64_t kept = 0;
    for (int64_t channel = 0; channel < states->width; channel += 64) {
        uint64_t mask = read_mask(states, token, channel, kind, inside), signs = 0;
        if (recovers)
            signs = read_signs(states, token, channel - kept, mask, inside);
        if (channel + 64 <= stride) {
            lanes rest[4];
            UNROLLED for (int i = 0; i < 4; i++) rest[i] = recover(level + channel + i * LINE, amplitude, signs >> i * LINE, kind);
            unpack_block(to + channel, values + kept * value_bytes(1, number), number, mask, rest);
            kept += __builtin_popcountll(mask);
            continue;
        }
        const char *from = values + kept * value_bytes(1, number);
        for (int64_t line = 0; channel + line < stride; line += LINE, mask >>= LINE) {
            lanes recovered = recover(level + channel + line, amplitude, signs >> line, kind);
            store_line(to + channel + line, unpack_line(from, number, mask & 0xffff, recovered));
            from += __builtin_popcount(mask & 0xffff) * value_bytes(1, number);
        }
    }
    return 1;
}

static ALWAYS_INLINE int unpack_kind(const struct states *states, int64_t first, int64_t count, const float *level,
                                     float *to, const int number, const int kind)
{
    const int64_t stride = lines_of(states->width), slack = states->tokens - FAR;
    int good = 1;
    for (int64_t token = first; token < first + count; token++, to += stride)
        if (__builtin_expect(token < slack, 1))
            good &= unpack_token(states, token, level, to, number, kind, 1);
        else
            good &= unpack_token(states, token, level, to, number, kind, 0);
    return good;
}

static ALWAYS_INLINE int unpack_typed(const struct states *states, int64_t first, int64_t count, const float *level,
                                      float *to, const int number)
{
    return states->kind == EVERY ? unpack_kind(states, first, count, level, to, number, EVERY)
                                 : unpack_kind(states, first, count, level, to, number, BITS);
}

static ALWAYS_INLINE void prefetch(const void *part, int64_t first, int64_t count, int64_t size)
{
    const char *from = (const char *)part + first * size;
    for (int64_t at = 0; part && at < count * size; at += 64)
        __builtin_prefetch(from + at);
}

/* Fetches tokens from memory, which takes longer than to work on a block of them. */
static void prefetch_tokens(const struct states *states, int64_t first, int64_t count)
{
    const int number = states->number;
    prefetch(states->values, first, count, value_bytes(states->kept, number));
    prefetch(states->code, first, count, states->code_bytes);
    prefetch(states->signs, first, count, states->sign_bytes);
    prefetch(states->amplitude, first, count, has_scale(number) ? 1 : value_bytes(1, number));
    prefetch(states->scale, first, count, 2);
}

/* Unpacks tokens to lines_of(width) floats each, in units of `unit`, which is 1 but for integers. */
static int unpack_tokens(const struct states *states, int64_t first, int64_t count, const float *level, float *to,
                         float *unit)
{
    prefetch_tokens(states, first + count, smaller(TOKENS, states->tokens - first - count));
    for (int64_t t = 0; t < TOKENS; t++)
        unit[t] = has_scale(states->number) && t < count ? bf16_to_f32(states->scale[first + t]) : 1.0f;
    switch (states->number) { /* a separate loop for each type */
    case F32: return unpack_typed(states, first, count, level, to, F32);
    case BF16: return unpack_typed(states, first, count, level, to, BF16);
    case F16: return unpack_typed(states, first, count, level, to, F16);
    case I8: return unpack_typed(states, first, count, level, to, I8);
    case CODED: return unpack_all(states, first, count, to, 2);
    case CODED + 1: return unpack_all(states, first, count, to, 3);
    case CODED + 2: return unpack_all(states, first, count, to, 4);
    case CODED + 3: return unpack_all(states, first, count, to, 5);
    default: return unpack_all(states, first, count, to, MOST_BITS);
    }
}

/* The levels of a head, with zeros after the width. */
static void read_level(const struct states *states, int64_t head, float *level)
{
    memset(level, 0, (size_t)lines_of(states->width) * sizeof *level);
    if (states->level)
        memcpy(level, states->level + head * states->width, (size_t)states->width * sizeof *level);
}
