/* Products of many rows of activations with 2:4 weights, by an instruction that multiplies pairs of bf16 and adds both products:
 * as many.h, with lines of pairs. Activations are bf16, or fp32 that are rounded to it.
 *
 * Of each group of four channels, every pair that a row may keep has a line, whose numbers are the pairs of the tokens. A row
 * then needs one broadcast and one multiply-add for each vector of tokens and group. Channels p and q have line p + 2 q, so that
 * the places of all lines of a block follow from its code in a few operations. They are 2 to 8: those of a group begin PLACES
 * after those of the group before. Whatever a code is, its place is at most 9, and in the lines of the block.
 *
 * The activations of a tile of tokens are turned first, so that any order of channels is one of rows. Then the tile is
 * multiplied by a chunk of rows, block by block of channels. Its lines stay in the level 1 cache, and are written again for
 * each chunk, which takes less time than reading them from another cache. Sums are in the level 2 cache. */
enum { PLACES = 7, PAIR_LINES = BLOCK / 4 * PLACES + 3 };
enum { PAIR_LANES = 16, PAIR_VECTORS = PAIR_TOKENS / PAIR_LANES }; /* the lines that are used take 24 KiB */
enum { PAIR_ROWS = 4 };                                            /* enough sums to hide their latency */
enum { PAIR_AHEAD = 12 }; /* rows: their blocks are too far apart to be fetched by hardware */

/* The transpose of 16 x 16 numbers of 32 bits. */
static ALWAYS_INLINE void turn_16(__m512i row[16])
{
    __m512i part[16];
    UNROLLED for (int i = 0; i < 16; i += 2) {
        part[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        part[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(part[i + j], part[i + j + 2]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(part[i + j], part[i + j + 2]);
        }
    /* Lane l of 128 bits of row 4 i + j has column 4 l + j of rows 4 i to 4 i + 3. */
    UNROLLED for (int i = 0; i < 16; i += 8)
        UNROLLED for (int j = 0; j < 4; j++) {
            part[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0x88);
            part[i + j + 4] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0xdd);
        }
    UNROLLED for (int j = 0; j < 8; j++) {
        row[j] = _mm512_shuffle_i32x4(part[j], part[j + 8], 0x88);
        row[j + 8] = _mm512_shuffle_i32x4(part[j], part[j + 8], 0xdd);
    }
}

/* The first vector of a tile. Tiles differ by one vector at most. */
static ALWAYS_INLINE int64_t first_vector(const struct many_pairs *job, int64_t tile)
{
    return tile * ((job->batch + PAIR_LANES - 1) / PAIR_LANES) / job->tiles;
}

/* The channels of a tile. */
static ALWAYS_INLINE uint16_t *channels_of_tile(const struct many_pairs *job, int64_t tile)
{
    return job->channels + tile * job->weights->count * BLOCK * PAIR_TOKENS;
}

/* 32 channels of a token from `place` on, with zeros where `some` has no bit. */
static ALWAYS_INLINE __m512i load_channels(const struct many_pairs *job, int64_t place, __mmask32 some)
{
    if (job->number == BF16)
        return _mm512_maskz_loadu_epi16(some, (const uint16_t *)job->activations + place);
    const float *from = (const float *)job->activations + place;
    const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(some >> 16), from + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, _mm512_maskz_loadu_ps((__mmask16)some, from));
}

/* Turns 16 tokens of 32 channels, with zeros after the last token and channel: `even` and `odd` are those of 16 pairs. Returns
 * the channels in which some are not finite. */
static ALWAYS_INLINE __mmask32 turn_channels(const struct many_pairs *job, int64_t token, int64_t channel, __m256i even[16],
                                             __m256i odd[16])
{
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const int64_t width = job->weights->width, left = job->batch - token;
    const __mmask32 some = (__mmask32)((1ull << smaller(32, width - channel)) - 1);
    __mmask32 nonfinite = 0;
    __m512i row[16];
    UNROLLED for (int i = 0; i < 16; i++) {
        row[i] = i < left ? load_channels(job, (token + i) * width + channel, some) : _mm512_setzero_si512();
        nonfinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row[i], exponent), exponent);
    }
    turn_16(row);
    UNROLLED for (int i = 0; i < 16; i++) {
        even[i] = _mm512_cvtepi32_epi16(row[i]);
        odd[i] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(row[i], 16));
    }
    return nonfinite;
}

/* Writes the tokens of some tiles as a row of PAIR_TOKENS for each channel. Of each 32 tokens the first and the second 16 take
 * turns, four at a time: so does unpacking two rows to pairs, which then are in order. */
static void turn_tiles(const void *argument, int64_t first, int64_t last)
{
    const struct many_pairs *job = argument;
    const __m512i turns = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    __mmask32 nonfinite = 0;
    for (int64_t tile = first; tile < last; tile++)
        for (int64_t channel = 0; channel < job->weights->width; channel += 32)
            for (int half = 0; half < PAIR_TOKENS; half += 32) {
                __m256i one[2][16], two[2][16];
                const int64_t token = first_vector(job, tile) * PAIR_LANES + half;
                nonfinite |= turn_channels(job, token, channel, one[0], one[1]);
                nonfinite |= turn_channels(job, token + PAIR_LANES, channel, two[0], two[1]);
                uint16_t *to = channels_of_tile(job, tile) + channel * PAIR_TOKENS + half;
                for (int i = 0; i < 32; i++) {
                    const __m512i low = _mm512_castsi256_si512(one[i % 2][i / 2]), high = _mm512_castsi256_si512(two[i % 2][i / 2]);
                    _mm512_store_si512(to + i * PAIR_TOKENS, _mm512_permutex2var_epi64(low, turns, high));
                }
            }
    if (nonfinite)
        __atomic_store_n(job->nonfinite, 1, __ATOMIC_RELAXED);
}

/* Writes the lines of block `n` of a tile. */
static ALWAYS_INLINE void write_lines(const struct weights *weights, const uint16_t *channels, int64_t n, char *lines,
                                      const int vectors)
{
    static const uint16_t zeros[PAIR_TOKENS] __attribute__((aligned(64)));
    static const int8_t pairs[6][2] = {{0, 1}, {0, 2}, {1, 2}, {0, 3}, {1, 3}, {2, 3}};
    for (int group = 0; group < BLOCK / 4; group++, lines += PLACES * vectors * 64) {
        const uint16_t *row[4];
        UNROLLED for (int c = 0; c < 4; c++) {
            const int64_t channel = n * BLOCK + group * 4 + c;
            const int64_t from = weights->order && channel < weights->width ? weights->order[channel] : channel;
            row[c] = channel < weights->width ? channels + from * PAIR_TOKENS : zeros;
        }
        UNROLLED for (int v = 0; v < vectors; v += 2)
            UNROLLED for (int p = 0; p < 6; p++) {
                const int one = pairs[p][0], two = pairs[p][1];
                const __m512i a = _mm512_load_si512(row[one] + v * PAIR_LANES), b = _mm512_load_si512(row[two] + v * PAIR_LANES);
                char *to = lines + (one + 2 * two) * vectors * 64 + v * 64;
                _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
                if (v + 1 < vectors)
                    _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(a, b));
            }
    }
}

/* The places of the lines of a row's groups, four bits each. */
static ALWAYS_INLINE uint64_t places_of(uint64_t code)
{
    return (code & 0x3333333333333333) + (code >> 1 & 0x6666666666666666);
}

/* A code of POSITIONS with the lower position of each group first. */
static ALWAYS_INLINE uint64_t in_order(uint64_t code)
{
    const uint64_t first = 0x3333333333333333, some = turned(code) * 15;
    return (code & ~some) | (((code & first) << 2 | (code >> 2 & first)) & some);
}

/* Integers of a block, which bf16 holds exactly. */
static ALWAYS_INLINE __m512 low_steps(__m256i bytes)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
}

static ALWAYS_INLINE __m512 high_steps(__m256i bytes)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
}

static ALWAYS_INLINE __m512i read_steps_i8(const char *block)
{
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)(block + HEADER_I8));
    return (__m512i)_mm512_cvtne2ps_pbh(high_steps(bytes), low_steps(bytes));
}

/* The scales of two parts, each of eight values, from the bit of the first on. */
static ALWAYS_INLINE __m512 scales_of_two(uint32_t scales, int bit)
{
    const __m512i all = _mm512_set1_epi32((int32_t)(scales >> bit));
    const __m512i own = _mm512_mask_srli_epi32(all, 0xff00, all, 3);
    const __m512i power = _mm512_set1_epi32((int32_t)(LEAST_POWER + (scales >> 12 << 23)));
    const __m512i seven = _mm512_set1_epi32(7 << 20);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(power, _mm512_slli_epi32(own, 20), seven, OR_AND));
}

/* The values of a block of I4 as bf16, which are exact, with those of the lower positions first. */
static ALWAYS_INLINE __m512i read_steps_i4(const char *block)
{
    const uint64_t groups = _pext_u64(turned(read_code(block)), 0x1111111111111111);
    const __m256i bytes = load_nibbles(block + HEADER_I4), even = _mm256_add_epi8(bytes, bytes);
    const __mmask32 odd = (__mmask32)(_pdep_u64(groups, 0x55555555) * 3);
    const __m256i steps = _mm256_mask_add_epi8(even, odd, even, _mm256_set1_epi8(1));
    const uint32_t scales = read_scales(block);
    const __m512 low = _mm512_mul_ps(low_steps(steps), scales_of_two(scales, 0));
    const __m512 high = _mm512_mul_ps(high_steps(steps), scales_of_two(scales, 6));
    const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    return _mm512_mask_rol_epi32(pairs, (__mmask16)groups, pairs, 16);
}

/* The pairs of a block: in the block, or as bf16 in `memory`. */
static ALWAYS_INLINE const char *find_pairs(const char *block, const int32_t number, char *memory)
{
    if (number == BF16)
        return block + CODE;
    _mm512_store_si512(memory, number == I8 ? read_steps_i8(block) : read_steps_i4(block));
    return memory;
}

/* Four pairs, four times. Of a value that it knows to be loaded, a compiler makes a load of each pair, and the loads of lines
 * are all that a core makes: it does not get to know. */
static ALWAYS_INLINE __m512i load_four(const char *pairs)
{
    __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)pairs));
    __asm__("" : "+v"(four));
    return four;
}

/* Adds the products of a block of some rows, `apart` bytes from each other, with a tile. The loop over the groups is not
 * unrolled: its code would be larger than what processors read at the speed of these products. */
static ALWAYS_INLINE void add_rows(const char *block, int64_t apart, const char *lines, float (*sums)[PAIR_TOKENS],
                                   int first, const int32_t number, const int vectors, const int rows)
{
    const int scaled = number == I8, size = vectors * 64; /* scaled afterwards; the bytes of a line */
    char memory[PAIR_ROWS][64] __attribute__((aligned(64)));
    const char *pairs[PAIR_ROWS];
    uint64_t places[PAIR_ROWS];
    __m512 sum[PAIR_ROWS][PAIR_VECTORS];
    UNROLLED for (int r = 0; r < rows; r++) {
        const uint64_t code = read_code(block + r * apart);
        places[r] = places_of(number == I4 ? in_order(code) : code);
        pairs[r] = find_pairs(block + r * apart, number, memory[r]);
        UNROLLED for (int v = 0; v < vectors; v++)
            sum[r][v] = first || scaled ? _mm512_setzero_ps() : _mm512_load_ps(sums[r] + v * PAIR_LANES);
    }
/* Shuffles need literal numbers. */
#define ADD_GROUP(group)                                                                                               \
    UNROLLED for (int r = 0; r < rows; r++) {                                                                          \
        const __m512bh w = (__m512bh)_mm512_shuffle_epi32(four[r], group * 0x55);                                      \
        const char *line = lines + (group * PLACES + (places[r] >> 4 * group & 15)) * size;                            \
        UNROLLED for (int v = 0; v < vectors; v++)                                                                     \
            sum[r][v] = _mm512_dpbf16_ps(sum[r][v], w, (__m512bh)_mm512_load_si512(line + v * 64));                    \
    }
    NOT_UNROLLED for (int64_t done = 0; done < 64; done += 16) {
        __m512i four[PAIR_ROWS];
        UNROLLED for (int r = 0; r < rows; r++)
            four[r] = load_four(pairs[r] + done);
        ADD_GROUP(0) ADD_GROUP(1) ADD_GROUP(2) ADD_GROUP(3)
        lines += 4 * PLACES * size;
        UNROLLED for (int r = 0; r < rows; r++)
            places[r] >>= 16;
    }
#undef ADD_GROUP
    UNROLLED for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(scaled ? read_scale(block + r * apart, I8, 0) : 1.0f);
        UNROLLED for (int v = 0; v < vectors; v++) {
            float *to = sums[r] + v * PAIR_LANES;
            if (scaled)
                sum[r][v] = _mm512_fmadd_ps(sum[r][v], scale, first ? _mm512_setzero_ps() : _mm512_load_ps(to));
            _mm512_store_ps(to, sum[r][v]);
        }
    }
}

/* 16 sums of each of two rows, with the bias of both, as pairs of bf16. */
static ALWAYS_INLINE __m512i pair_rows(const float *even, const float *odd, const float bias[2])
{
    static const uint16_t pairs[32] __attribute__((aligned(64))) = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512 first = _mm512_add_ps(_mm512_load_ps(even), _mm512_set1_ps(bias[0]));
    const __m512 second = _mm512_add_ps(_mm512_load_ps(odd), _mm512_set1_ps(bias[1]));
    return _mm512_permutexvar_epi16(_mm512_load_si512(pairs), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* Writes 64 bytes, or those that `some` has, two at a time; past the caches, if they are `streamed` and whole lines. */
static ALWAYS_INLINE void write_vector(void *to, __mmask32 some, __m512i vector, int streamed)
{
    if (streamed && some == UINT32_MAX && (uintptr_t)to % 64 == 0)
        _mm512_stream_si512(to, vector);
    else
        _mm512_mask_storeu_epi16(to, some, vector);
}

/* Writes those of 16 floats that `some` has as fp32 or fp16. */
static ALWAYS_INLINE void write_floats_16(const struct many_pairs *job, int64_t place, __mmask16 some, __m512 floats)
{
    if (job->number == F32)
        _mm512_mask_storeu_ps((float *)job->output + place, some, floats);
    else
        _mm256_mask_storeu_epi16((uint16_t *)job->output + place, some, _mm512_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT));
}

/* Writes the sums of up to 32 rows from `row` on, `stride` numbers from each other, and of 16 tokens, in the type of the
 * activations. */
static ALWAYS_INLINE void write_group(const struct many_pairs *job, int64_t row, int64_t rows, int64_t token, const float *sums,
                                      const int64_t stride, const float bias[32], int streamed)
{
    const int64_t apart = job->weights->rows, tokens = smaller(16, job->batch - token), place = token * apart + row;
    const __mmask32 some = (__mmask32)((1ull << rows) - 1);
    __m512i line[16];
    if (job->number == BF16) { /* whole lines of a cache */
        UNROLLED for (int i = 0; i < 16; i++)
            line[i] = pair_rows(sums + 2 * i * stride, sums + (2 * i + 1) * stride, bias + 2 * i);
        turn_16(line);
        UNROLLED for (int i = 0; i < 16; i++)
            if (i < tokens)
                write_vector((uint16_t *)job->output + place + i * apart, some, line[i], streamed);
        return;
    }
    for (int half = 0; half < 32; half += 16) {
        UNROLLED for (int i = 0; i < 16; i++)
            line[i] = (__m512i)_mm512_add_ps(_mm512_load_ps(sums + (half + i) * stride), _mm512_set1_ps(bias[half + i]));
        turn_16(line);
        UNROLLED for (int i = 0; i < 16; i++)
            if (i < tokens)
                write_floats_16(job, place + i * apart + half, (__mmask16)(some >> half), (__m512)line[i]);
    }
}

/* Writes the sums of a tile of tokens. There is room for sums of whole chunks. */
static void write_sums(const struct many_pairs *job, int64_t row, int rows, int64_t token, int tokens,
                       float (*sums)[PAIR_TOKENS])
{
    const struct weights *weights = job->weights;
    for (int r = 0; r < rows; r += 32) {
        const int many = (int)smaller(32, rows - r);
        float bias[32] = {0};
        for (int i = 0; weights->bias && i < many; i++)
            bias[i] = read_number(weights->bias, row + r + i, weights->bias_number);
        for (int t = 0; t < tokens; t += 16)
            write_group(job, row + r, many, token + t, sums[r] + t, PAIR_TOKENS, bias, 0);
    }
}

/* The products of `rows` rows from `row` on with a tile of `vectors` vectors. */
static ALWAYS_INLINE void multiply_tile(const struct many_pairs *job, int64_t row, int rows, int64_t tile,
                                        float (*sums)[PAIR_TOKENS], const int32_t number, const int vectors)
{
    const struct weights *weights = job->weights;
    const int64_t size = block_bytes(weights), apart = weights->count * size;
    char lines[PAIR_LINES * PAIR_TOKENS * 4] __attribute__((aligned(64)));
    for (int64_t n = 0; n < weights->count; n++) {
        write_lines(weights, channels_of_tile(job, tile), n, lines, vectors);
        const char *block = weights->blocks + row * apart + n * size;
        for (int r = 0, many; r < rows; r += many, block += many * apart) {
            many = rows - r < PAIR_ROWS ? 1 : PAIR_ROWS;
            for (int i = 0; i < many; i++) { /* outside of the weight it does no harm */
                const uintptr_t ahead = (uintptr_t)block + (uintptr_t)((PAIR_AHEAD + i) * apart);
                __builtin_prefetch((const char *)ahead);
                __builtin_prefetch((const char *)(ahead + (uintptr_t)(size - 1)));
            }
            if (many == PAIR_ROWS)
                add_rows(block, apart, lines, sums + r, n == 0, number, vectors, PAIR_ROWS);
            else
                add_rows(block, apart, lines, sums + r, n == 0, number, vectors, 1);
        }
    }
    const int64_t token = first_vector(job, tile) * PAIR_LANES;
    write_sums(job, row, rows, token, (int)smaller(vectors * PAIR_LANES, job->batch - token), sums);
}

/* The products of some tiles with chunks of rows: the tiles follow each other, so that a chunk is in a cache for all but one. */
static void multiply_pairs(const void *argument, int64_t first, int64_t last)
{
    const struct many_pairs *job = argument;
    float sums[PAIR_CHUNK][PAIR_TOKENS] __attribute__((aligned(64)));
    for (int64_t item = first; item < last; item++) {
        const int64_t tile = item % job->tiles, row = item / job->tiles * job->chunk;
        const int rows = (int)smaller(job->chunk, job->weights->rows - row);
        const int many = (int)(first_vector(job, tile + 1) - first_vector(job, tile));
        switch (job->weights->number * PAIR_VECTORS + many) {
#define MULTIPLY(number, many)                                                                                         \
    case number * PAIR_VECTORS + many: multiply_tile(job, row, rows, tile, sums, number, many); break;
#define MULTIPLY_ALL(number) MULTIPLY(number, 1) MULTIPLY(number, 2) MULTIPLY(number, 3) MULTIPLY(number, 4)
            MULTIPLY_ALL(BF16)
            MULTIPLY_ALL(I8)
            MULTIPLY_ALL(I4)
#undef MULTIPLY_ALL
#undef MULTIPLY
        }
    }
}
