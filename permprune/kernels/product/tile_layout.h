/* Activations and packed weights as tiles of bf16, the operands of many_tiles.h: 16 tokens, or rows of the weight, by 32 channels.
 *
 * fp32 and fp16 are split into parts in bf16, whose sum they are (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
 * intelligence datatype for higher-precision computations", ARITH 2019): tiles of the parts of a step of channels follow each
 * other. */

enum { SIDE = 16, STEP = 32, TILE = SIDE * STEP }; /* rows and channels of a tile, and its numbers */
enum { AMX_CHANNELS = 512, AMX_BLOCKS = AMX_CHANNELS / BLOCK }; /* the most of a panel */

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

/* The blocks that are multiplied at a time, of which the level 1 cache holds the parts of a panel and of 32 tokens. */
static ALWAYS_INLINE int64_t blocks_at_a_time(const struct many_pairs *job)
{
    const int64_t blocks = AMX_BLOCKS / (parts_of(job->weights->number) * token_parts(job->weights, job->number));
    return blocks < 1 ? 1 : blocks;
}

/* ---- activations ---- */

/* The first tile of a group of 16 tokens from block `n` on. Blocks that are multiplied at a time follow each other; in each, the
 * tiles of two groups take turns, as they are read, for each part of the numbers. */
static ALWAYS_INLINE uint16_t *tokens_of_group(const struct many_pairs *job, int64_t group, int64_t n)
{
    const int64_t most = blocks_at_a_time(job), start = n / most * most, count = smaller(most, job->weights->count - start);
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

/* The masks of the channels that eight codes of POSITIONS keep. */
static ALWAYS_INLINE __m512i masks_of(__m512i codes)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
    const __m512i low = _mm512_set1_epi8(15), first = _mm512_and_si512(codes, low);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
    return _mm512_or_si512(_mm512_shuffle_epi8(table, first), _mm512_slli_epi16(_mm512_shuffle_epi8(table, second), 4));
}

/* The channels of a block as bf16, for its kept integers in the order of the channels. */
static ALWAYS_INLINE void expand_steps(const char *block, uint64_t bits, __m512i steps, const int32_t number, __m512i out[2])
{
    const __m512i bytes = _mm512_maskz_expand_epi8(bits, steps);
    __m512 part[4];
#define EXPAND_PART(i)                                                                                                 \
    part[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, i))),             \
                            _mm512_set1_ps(read_scale(block, number, PART * i)));
    EXPAND_PART(0) EXPAND_PART(1) EXPAND_PART(2) EXPAND_PART(3)
#undef EXPAND_PART
    out[0] = (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]);
    out[1] = (__m512i)_mm512_cvtne2ps_pbh(part[3], part[2]);
}

/* The 64 channels of a block of fp32 or fp16 in parts of bf16, those of each 32 channels. */
static ALWAYS_INLINE void expand_parts(const char *block, uint64_t bits, const char *end, const int32_t number, __m512i *out)
{
    const int bytes = number == F32 ? 4 : 2;
    char room[4 * BLOCK];
    const char *values = readable(block + CODE, end, room, (size_t)(bytes * BLOCK));
    __m512 part[4];
    UNROLLED for (int i = 0; i < 4; i++, bits >>= SIDE) {
        const __mmask16 some = (__mmask16)bits;
        part[i] = number == F32 ? _mm512_maskz_expandloadu_ps(some, values)
                                : _mm512_cvtph_ps(_mm256_maskz_expandloadu_epi16(some, values));
        values += bytes * __builtin_popcount(some);
    }
    split(part[0], part[1], parts_of(number), out, 2);
    split(part[2], part[3], parts_of(number), out + 1, 2);
}

/* The 64 channels of a block in parts of bf16, those of each 32, with zeros where `bits` has none. Nothing from `end` on is read. */
static ALWAYS_INLINE void unpack_block(const char *block, uint64_t bits, const char *end, const int32_t number,
                                       const int32_t kind, __m512i *out)
{
    const __mmask32 low = (__mmask32)bits, high = (__mmask32)(bits >> 32);
    const char *values = block + (number == BF16 ? CODE : number == I8 ? HEADER_I8 : HEADER_I4);
    char room[2 * BLOCK];
    if (number == F32 || number == F16) {
        expand_parts(block, bits, end, number, out);
    } else if (kind == POSITIONS && number != I8) { /* 16 of each half */
        const __m512i kept = number == I4 ? read_steps_i4(block) : _mm512_loadu_si512(values);
        out[0] = _mm512_maskz_expand_epi16(low, kept);
        out[1] = _mm512_maskz_expand_epi16(high, _mm512_shuffle_i64x2(kept, kept, 0xee));
    } else if (number == BF16) {
        const uint16_t *kept = readable(values, end, room, 2 * BLOCK);
        out[0] = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(kept));
        out[1] = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(kept + __builtin_popcount(low)));
    } else if (number == I8) {
        expand_steps(block, bits, _mm512_loadu_si512(readable(values, end, room, BLOCK)), I8, out);
    } else {
        values = readable(values, end, room, BLOCK / 2);
        const __m512i first = _mm512_castsi256_si512(load_nibbles(values));
        expand_steps(block, bits, _mm512_inserti64x4(first, load_nibbles(values + BLOCK / 4), 1), I4, out);
    }
}

/* Unpacks `count` blocks from number `n` on of a panel to tiles: of each step and part, one of its first and one of its last 16
 * rows. */
static ALWAYS_INLINE void unpack_panel(const struct weights *weights, int64_t row, int64_t n, int64_t count, uint16_t *tiles,
                                       const int32_t number, const int32_t kind)
{
    const int64_t size = block_bytes(weights), apart = weights->count * size, rows = smaller(TILE_PANEL, weights->rows - row);
    const int parts = parts_of(number);
    const char *const end = weights->blocks + weights->rows * apart, *const panel = weights->blocks + row * apart + n * size;
    uint64_t masks[TILE_PANEL][AMX_BLOCKS] __attribute__((aligned(64))) = {{0}};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++)
            masks[r][i] = read_code(panel + r * apart + i * size);
    for (int64_t r = 0; r < rows && kind == POSITIONS; r++)
        _mm512_store_si512(masks[r], masks_of(_mm512_load_si512(masks[r])));
    for (int64_t i = 0; i < count; i++, tiles += 4 * parts * TILE)
        for (int64_t r = 0; r < TILE_PANEL; r++) {
            __m512i out[2 * PARTS];
            if (r < rows)
                unpack_block(panel + r * apart + i * size, masks[r][i], end, number, kind, out);
            UNROLLED for (int part = 0; part < parts; part++) {
                _mm512_store_si512(tiles + r * STEP + 2 * part * TILE, r < rows ? out[2 * part] : _mm512_setzero_si512());
                _mm512_store_si512(tiles + r * STEP + 2 * (parts + part) * TILE,
                                   r < rows ? out[2 * part + 1] : _mm512_setzero_si512());
            }
        }
}
