/* Activations and packed weights as tiles of bf16, the operands of many_tiles.h: 16 tokens, or rows of the weight, by 32 channels.
 *
 * fp32 and fp16 are split into parts in bf16, whose sum they are (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
 * intelligence datatype for higher-precision computations", ARITH 2019): tiles of the parts of a step of channels follow each
 * other. */

enum { SIDE = 16, STEP = 32, TILE = SIDE * STEP }; /* rows and channels of a tile, and its numbers */

/* Splits 32 numbers into `parts` vectors of bf16, `apart` from each other: the nearest bf16, that of what is left, and so on. */
static ALWAYS_INLINE void split(__m512 low, __m512 high, const int parts, __m512i *to, int64_t apart)
{
    const __m512 most = _mm512_set1_ps(0x1.fep127f), least = _mm512_set1_ps(-0x1.fep127f); /* larger ones become infinite */
    UNROLLED for (int part = 0; part < parts; part++, to += apart) {
        const __m512 near_low = part ? low : _mm512_min_ps(_mm512_max_ps(low, least), most);
        const __m512 near_high = part ? high : _mm512_min_ps(_mm512_max_ps(high, least), most);
        *to = (__m512i)_mm512_cvtne2ps_pbh(near_high, near_low);
        const __m512i words_low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(*to));
        const __m512i words_high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*to, 1));
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(words_low, 16)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(words_high, 16)));
    }
}

/* ---- activations ---- */

/* The first tile of a group of 16 tokens from block `n` on. Blocks that are multiplied at a time follow each other; in each, the
 * tiles of two groups take turns, as they are read, for each part of the numbers. */
static ALWAYS_INLINE uint16_t *tokens_of_group(const struct many_pairs *job, int64_t group, int64_t n)
{
    const int64_t most = job->blocks, start = n / most * most, count = smaller(most, job->weights->count - start);
    const int64_t steps = 2 * (start * pairs_of_groups(job->batch) + group / 2 * count + (n - start));
    return job->channels + (2 * steps * token_parts(job->weights, job->number) + group % 2) * TILE;
}

/* 32 channels of a token in the weight's order, with zeros where `some` has no bit. */
static ALWAYS_INLINE __m512i load_in_order(const struct many_pairs *job, int64_t token, int64_t channel, __mmask32 some)
{
    const int64_t *order = job->weights->order, first = token * job->weights->width;
    if (!order)
        return load_channels(job, first + channel, some);
    uint16_t line[STEP] __attribute__((aligned(64))) = {0};
    const int count = (int)smaller(STEP, job->weights->width - channel);
    if (job->number == BF16)
        for (int c = 0; c < count; c++)
            line[c] = ((const uint16_t *)job->activations)[first + order[channel + c]];
    else
        for (int c = 0; c < count; c++)
            line[c] = f32_to_bf16(((const float *)job->activations)[first + order[channel + c]]);
    return _mm512_load_si512(line);
}

/* The same in parts, at `apart` vectors from each other. Returns whether some are not finite. */
static ALWAYS_INLINE int load_parts(const struct many_pairs *job, int64_t token, int64_t channel, __mmask32 some, const int parts,
                                    __m512i *to, int64_t apart)
{
    enum { NOT_FINITE = 0x99 }; /* the classes of NaN and of infinities */
    const int64_t *order = job->weights->order, first = token * job->weights->width;
    float line[STEP] __attribute__((aligned(64))) = {0};
    __m512 low, high;
    if (order) {
        const int count = (int)smaller(STEP, job->weights->width - channel);
        for (int c = 0; c < count; c++)
            line[c] = read_number(job->activations, first + order[channel + c], job->number);
        low = _mm512_load_ps(line);
        high = _mm512_load_ps(line + SIDE);
    } else if (job->number == F16) {
        const __m512i halves = _mm512_maskz_loadu_epi16(some, (const uint16_t *)job->activations + first + channel);
        low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    } else {
        const float *from = (const float *)job->activations + first + channel;
        low = _mm512_maskz_loadu_ps((__mmask16)some, from);
        high = _mm512_maskz_loadu_ps((__mmask16)(some >> SIDE), from + SIDE);
    }
    split(low, high, parts, to, apart);
    return _mm512_fpclass_ps_mask(low, NOT_FINITE) | _mm512_fpclass_ps_mask(high, NOT_FINITE);
}

/* Lays out some groups of 16 tokens, with zeros after the last token and channel. */
static ALWAYS_INLINE void lay_out_groups(const struct many_pairs *job, int64_t first, int64_t last, const int parts)
{
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const int64_t width = job->weights->width, channels = job->weights->count * BLOCK;
    const int splits = parts_of(job->weights->number) > 1; /* zeros among the parts of a weight make infinities NaN */
    int nonfinite = 0;
    for (int64_t group = first; group < last; group++)
        for (int64_t channel = 0; channel < channels; channel += STEP) {
            const int64_t left = smaller(STEP, width - channel), token = group * SIDE;
            const __mmask32 some = left > 0 ? (__mmask32)((1ull << left) - 1) : 0;
            uint16_t *to = tokens_of_group(job, group, channel / BLOCK) + channel % BLOCK / STEP * 2 * parts * TILE;
            __m512i rows[PARTS][SIDE];
            UNROLLED for (int i = 0; i < SIDE; i++)
                if (!some || token + i >= job->batch) {
                    for (int part = 0; part < parts; part++)
                        rows[part][i] = _mm512_setzero_si512();
                } else if (parts == 1) {
                    rows[0][i] = load_in_order(job, token + i, channel, some);
                    nonfinite |= splits && _mm512_cmpeq_epi16_mask(_mm512_and_si512(rows[0][i], exponent), exponent);
                } else {
                    nonfinite |= load_parts(job, token + i, channel, some, parts, &rows[0][i], SIDE);
                }
            UNROLLED for (int part = 0; part < parts; part++, to += 2 * TILE) {
                turn_16(rows[part]);
                UNROLLED for (int i = 0; i < SIDE; i++)
                    _mm512_store_si512(to + i * STEP, rows[part][i]);
            }
        }
    if (nonfinite)
        __atomic_store_n(job->nonfinite, 1, __ATOMIC_RELAXED);
}

static void lay_out_tokens(const void *argument, int64_t first, int64_t last)
{
    const struct many_pairs *job = argument;
    switch (token_parts(job->weights, job->number)) {
    case 1: lay_out_groups(job, first, last, 1); break;
    case 2: lay_out_groups(job, first, last, 2); break;
    default: lay_out_groups(job, first, last, 3);
    }
}

/* ---- weights ---- */

/* 32 channels in groups of four, each of which keeps two of `pairs`: at the places in the lowest 32 bits of a code of POSITIONS. */
static ALWAYS_INLINE __m512i spread_pairs(const void *pairs, uint64_t code)
{
/* Which bytes of a pair are those of a group's channels; the highest bit says none. */
#define BYTES(first, second) (int64_t)(0x8080808080808080 ^ 0x8180ull << 16 * (first) ^ 0x8382ull << 16 * (second))
    const __m512i low = _mm512_setr_epi64(-1, BYTES(0, 1), BYTES(0, 2), BYTES(0, 3), BYTES(0, 1), -1, BYTES(1, 2), BYTES(1, 3));
    const __m512i high = _mm512_setr_epi64(BYTES(0, 2), BYTES(1, 2), -1, BYTES(2, 3), BYTES(0, 3), BYTES(1, 3), BYTES(2, 3), -1);
#undef BYTES
    const __m512i odd = _mm512_set4_epi64(0x0808080808080808, 0, 0x0808080808080808, 0); /* the second pair of 128 bits */
    const __m512i shifts = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i codes = _mm512_srlv_epi64(_mm512_set1_epi64((int64_t)code), shifts);
    const __m512i bytes = _mm512_or_si512(_mm512_permutex2var_epi64(low, codes, high), odd);
    return _mm512_shuffle_epi8(_mm512_cvtepu32_epi64(_mm256_loadu_si256(pairs)), bytes);
}

/* The channels of a block as bf16, for their integers and the scale of each part of them. */
static ALWAYS_INLINE void scale_steps(__m512i steps, const float scale[4], __m512i out[2])
{
    __m512 part[4];
#define SCALE_PART(i)                                                                                                  \
    part[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(steps, i))),             \
                            _mm512_set1_ps(scale[i]));
    SCALE_PART(0) SCALE_PART(1) SCALE_PART(2) SCALE_PART(3)
#undef SCALE_PART
    out[0] = (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]);
    out[1] = (__m512i)_mm512_cvtne2ps_pbh(part[3], part[2]);
}

/* The same for the integers that a block keeps, in the order of the channels. */
static ALWAYS_INLINE void expand_steps(const char *block, uint64_t bits, __m512i steps, const int32_t number, __m512i out[2])
{
    float scale[4];
    UNROLLED for (int i = 0; i < 4; i++)
        scale[i] = read_scale(block, number, PART * i);
    scale_steps(_mm512_maskz_expand_epi8(bits, steps), scale, out);
}

/* The 64 channels of a block of fp32 or fp16 in parts of bf16, for its values. */
static ALWAYS_INLINE void expand_parts(const char *values, uint64_t bits, const int32_t number, __m512i *out)
{
    const int bytes = number == F32 ? 4 : 2;
    __m512 part[4];
    UNROLLED for (int i = 0; i < 4; i++, bits >>= SIDE) {
        const __mmask16 some = (__mmask16)bits;
        part[i] = number == F32 ? _mm512_maskz_expandloadu_ps(some, values)
                                : _mm512_cvtph_ps(_mm256_maskz_expandloadu_epi16(some, values));
        values += bytes * __builtin_popcount(some);
    }
    split(part[0], part[1], parts_of(number), out, 1);
    split(part[2], part[3], parts_of(number), out + parts_of(number), 1);
}

/* The 64 channels of a block in parts of bf16, all of the first 32 before those of the others, with zeros for what is pruned.
 * Nothing after the weight is read. */
static ALWAYS_INLINE void unpack_block(const struct weights *weights, const char *block, const int32_t number, const int32_t kind,
                                       __m512i *out)
{
    if (kind == PLAIN) {
        const float scale = weights->scale[(block - weights->blocks) / BLOCK];
        scale_steps(_mm512_loadu_si512(block), (float[]){scale, scale, scale, scale}, out);
        return;
    }
    const uint64_t code = read_code(block);
    if (kind == POSITIONS && number == BF16) {
        out[0] = spread_pairs(block + CODE, code);
        out[1] = spread_pairs(block + CODE + BLOCK / 2, code >> 32);
        return;
    }
    if (kind == POSITIONS && number == I4) {
        const __m512i kept = read_steps_i4(block);
        out[0] = spread_pairs(&kept, code);
        out[1] = spread_pairs((const __m256i *)&kept + 1, code >> 32);
        return;
    }
    static const size_t most[STORED] = {[F32] = 4 * BLOCK, [BF16] = 2 * BLOCK, [F16] = 2 * BLOCK, [I8] = BLOCK, [I4] = BLOCK / 2};
    const uint64_t bits = kept_channels(code, kind);
    const char *const end = weights->blocks + weights->rows * weights->count * block_bytes(weights);
    char room[4 * BLOCK];
    const char *values = readable(block + header_bytes(weights), end, room, most[number]);
    if (number == F32 || number == F16) {
        expand_parts(values, bits, number, out);
    } else if (number == BF16) {
        out[0] = _mm512_maskz_expand_epi16((__mmask32)bits, _mm512_loadu_si512(values));
        values += 2 * __builtin_popcount((uint32_t)bits);
        out[1] = _mm512_maskz_expand_epi16((__mmask32)(bits >> 32), _mm512_loadu_si512(values));
    } else if (number == I8) {
        expand_steps(block, bits, _mm512_loadu_si512(values), I8, out);
    } else {
        const __m512i first = _mm512_castsi256_si512(load_nibbles(values));
        expand_steps(block, bits, _mm512_inserti64x4(first, load_nibbles(values + BLOCK / 4), 1), I4, out);
    }
}

/* Unpacks `count` blocks from number `n` on of a panel to tiles: of each step and part, one of its first and one of its last 16
 * rows. If there is a `next`, as much is fetched from there. */
static ALWAYS_INLINE void unpack_panel(const struct weights *weights, int64_t row, int64_t n, int64_t count, uint16_t *tiles,
                                       uintptr_t next, const int32_t number, const int32_t kind)
{
    const int64_t size = block_bytes(weights), apart = weights->count * size, rows = smaller(TILE_PANEL, weights->rows - row);
    const int parts = parts_of(number);
    const char *const panel = weights->blocks + row * apart + n * size;
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < TILE_PANEL; r++) {
            uint16_t *to = tiles + i * 4 * parts * TILE + r * STEP;
            __m512i out[2 * PARTS] = {0};
            for (int64_t byte = 0; next && byte < size; byte += 64)
                __builtin_prefetch((const char *)(next + (uintptr_t)(r * apart + i * size + byte)), 0, 3);
            if (r < rows)
                unpack_block(weights, panel + r * apart + i * size, number, kind, out);
            UNROLLED for (int part = 0; part < 2 * parts; part++)
                _mm512_store_si512(to + 2 * part * TILE, out[part]);
        }
}
