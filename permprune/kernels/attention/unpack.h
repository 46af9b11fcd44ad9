/* Packed tokens as floats. Expects, inside BEGIN_TARGET and END_TARGET, these functions:
 *
 *     lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
 *         successive numbers at the ones of `bits`, and the lanes of `rest` elsewhere; may read LINE numbers
 *     void unpack_block(float *to, const char *from, const int number, uint64_t mask, const lanes *rest)
 *         the same for four lines; may read 64 numbers
 *     void unpack_signed_block(float *to, const char *from, int64_t first, uint64_t mask, const lanes *rest, uint64_t signs)
 *         likewise of `magnitudes`, whose places are from number `first` of `from` on, negated, as is `rest`, at the ones of
 *         `signs`
 *     lanes flip(lanes values, uint32_t bits)
 *         negates the lanes at the ones of `bits`; this one and the two before only where HAS_BLOCKS is defined
 *     bytes look_up(const uint8_t *table, bytes places)
 *         the entries of a table of LINE
 *     uint64_t deposit(uint64_t bits, uint64_t places), uint64_t deposit_pairs(uint64_t bits, uint64_t places)
 *         successive bits at the ones of `places`, of which each four have two for the second
 */
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
    const uint64_t ones = 0x1111111111111111;
    const int64_t left = states->width - channel;
    const uint64_t channels = left < 64 ? (1ull << left) - 1 : ~0ull;
    if (kind == EVERY)
        return channels;
    const uint8_t *code = states->code + token * states->code_bytes, *end = states->code + states->tokens * states->code_bytes;
    if (kind == BITS)
        return channels & read_bytes(code + channel / 8, end, inside);
    const int64_t bytes = (states->width / 4 + 7) / 8; /* of a plane; 16 groups of it are read */
    const uint64_t a = read_bytes(code + channel / 32, end, inside);
    const uint64_t b = read_bytes(code + bytes + channel / 32, end, inside);
    if (kind == TWO_OF_4) { /* a: channel 0 is kept; b: channel 1 is as channel 0; c: channel 2 is */
        const uint64_t c = read_bytes(code + 2 * bytes + channel / 32, end, inside) & ~b;
        return channels & (deposit(a, ones) | deposit(~(a ^ b), ones) << 1 | deposit(~(a ^ c), ones) << 2 |
                           deposit(a ^ (b | c), ones) << 3);
    }
    const uint64_t one = deposit(~(a | b), ones) | deposit(a & ~b, ones) << 1 | deposit(b & ~a, ones) << 2 |
                         deposit(a & b, ones) << 3;
    return channels & (kind == ONE_OF_4 ? one : ~one);
}

/* The signs of the channels that `mask` does not keep among 64, of which the first is number `pruned` of those. */
static ALWAYS_INLINE uint64_t read_signs(const struct states *states, int64_t token, int64_t pruned, uint64_t mask,
                                         const int kind, const int inside)
{
    const uint8_t *from = states->signs + token * states->sign_bytes + pruned / 8;
    const uint8_t *end = states->signs + states->tokens * states->sign_bytes;
    uint64_t bits = read_bytes(from, end, inside);
    if (kind == TWO_OF_4)
        return deposit_pairs(bits, ~mask);
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

/* Writes `count` magnitudes as bytes; their places are from number `first` of `from` on. May read 2 LINE bytes and write
 * 2 LINE more. Returns where the first is. */
static ALWAYS_INLINE const char *spread_magnitudes(char *to, const char *from, int64_t first, int64_t count)
{
    const char *begin = to + first % 2;
    from += first / 2;
    for (count += first % 2; count > 0; count -= 2 * LINE, from += LINE, to += 2 * LINE) {
        bytes both, low, high, part[2];
        memcpy(&both, from, sizeof both);
        low = look_up(magnitudes, both & 15);
        high = look_up(magnitudes, both >> 4);
        part[0] = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        part[1] = __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        memcpy(to, part, sizeof part);
    }
    return begin;
}

#if !defined(HAS_BLOCKS)
static ALWAYS_INLINE void unpack_signed_block(float *to, const char *from, int64_t first, uint64_t mask, const lanes *rest,
                                              uint64_t signs)
{
    char room[96];
    unpack_block(to, spread_magnitudes(room, from, first, __builtin_popcountll(mask)), I8, mask, rest);
    UNROLLED for (int i = 0; i < 4; i++, signs >>= LINE)
        store_line(to + i * LINE, flip(load_line(to + i * LINE), signs & 0xffff));
}
#endif

/* Unpacks a token to lines_of(width) floats, with zeros after the width, in steps of one integer for integers. `level` has
 * as many. Returns 0 if a code keeps another number of channels than it should; the token becomes zero. */
static ALWAYS_INLINE int unpack_token(const struct states *states, int64_t token, const float *level, float *to,
                                      const int number, const int kind, const int inside)
{
    const int64_t stride = lines_of(states->width), length = value_bytes(states->kept, number);
    const char *values = states->values + token * length;
    char room[(WIDEST + 64) * 4], spread[96];
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
        if (number == I5)
            signs = read_bytes(states->signs + token * states->sign_bytes + channel / 8,
                               states->signs + states->tokens * states->sign_bytes, inside);
        else if (recovers)
            signs = read_signs(states, token, channel - kept, mask, kind, inside);
        const uint64_t flipped = number == I5 ? 0 : signs; /* of what is recovered; of I5 all channels are, at the end */
        if (channel + 64 <= stride) {
            lanes rest[4];
            UNROLLED for (int i = 0; i < 4; i++) rest[i] = recover(level + channel + i * LINE, amplitude, flipped >> i * LINE, kind);
            if (number == I5)
                unpack_signed_block(to + channel, values, kept, mask, rest, signs);
            else
                unpack_block(to + channel, values + kept * value_bytes(1, number), number, mask, rest);
            kept += kind == TWO_OF_4 ? 32 : __builtin_popcountll(mask);
            continue;
        }
        const char *from = number == I5 ? spread_magnitudes(spread, values, kept, __builtin_popcountll(mask))
                                        : values + kept * value_bytes(1, number);
        for (int64_t line = 0; channel + line < stride; line += LINE, mask >>= LINE) {
            lanes own = recover(level + channel + line, amplitude, flipped >> line, kind);
            own = unpack_line(from, number == I5 ? I8 : number, mask & 0xffff, own);
            store_line(to + channel + line, number == I5 ? flip(own, signs >> line & 0xffff) : own);
            from += __builtin_popcount(mask & 0xffff) * value_bytes(1, number == I5 ? I8 : number);
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
    switch (states->kind) { /* a separate loop for each kind */
    case EVERY: return unpack_kind(states, first, count, level, to, number, EVERY);
    case TWO_OF_4: return unpack_kind(states, first, count, level, to, number, TWO_OF_4);
    case BITS: return unpack_kind(states, first, count, level, to, number, BITS);
    case ONE_OF_4: return unpack_kind(states, first, count, level, to, number, ONE_OF_4);
    default: return unpack_kind(states, first, count, level, to, number, THREE_OF_4);
    }
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
    default: return unpack_typed(states, first, count, level, to, I5);
    }
}

/* The levels of a head, with zeros after the width. */
static void read_level(const struct states *states, int64_t head, float *level)
{
    memset(level, 0, (size_t)lines_of(states->width) * sizeof *level);
    if (states->level)
        memcpy(level, states->level + head * states->width, (size_t)states->width * sizeof *level);
}
