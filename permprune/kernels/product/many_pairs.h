/* Products of many rows of activations in bf16 with 2:4 weights, by an instruction that multiplies pairs of bf16 and adds both
 * products: as many.h, with lines of pairs.
 *
 * Of each group of four channels, every pair that a row may keep has a line, whose numbers are the pairs of the tokens. A row
 * then needs one broadcast and one multiply-add for each vector of tokens and group. Channels p and q have line p + 2 q, so that
 * the places of all lines of a block follow from its code in a few operations. They are 2 to 8: those of a group begin PLACES
 * after those of the group before. Whatever a code is, its place is at most 9, and in the lines of the block.
 *
 * A tile of tokens is multiplied by a chunk of rows, block by block of channels. Its lines stay in the level 1 cache, and
 * are written again for each chunk: that takes a fiftieth of the time, and less than reading them from another cache. Sums are
 * in the level 2 cache. */
#include "product/nibbles.h"

enum { PLACES = 7, PAIR_LINES = BLOCK / 4 * PLACES + 3 };
enum { PAIR_LANES = 16, PAIR_VECTORS = PAIR_TOKENS / PAIR_LANES }; /* the lines that are used take 24 KiB */
enum { PAIR_ROWS = 2 };                                            /* enough sums to hide their latency */
enum { PAIR_AHEAD = 8 }; /* rows: their blocks are too far apart to be fetched by hardware */

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

/* Writes the lines of a group, which are `apart` bytes from each other: `low` has channels 0 and 1, and `high` 2 and 3. */
static ALWAYS_INLINE void write_pairs(__m512i low, __m512i high, char *to, int64_t apart)
{
    const __m512i lower = _mm512_set1_epi32(0xffff);
    const __m512i first = _mm512_and_si512(low, lower), second = _mm512_srli_epi32(low, 16);
    const __m512i third = _mm512_slli_epi32(high, 16), fourth = _mm512_andnot_si512(lower, high);
    _mm512_store_si512(to + 2 * apart, low);
    _mm512_store_si512(to + 4 * apart, _mm512_or_si512(first, third));
    _mm512_store_si512(to + 5 * apart, _mm512_or_si512(second, third));
    _mm512_store_si512(to + 6 * apart, _mm512_or_si512(first, fourth));
    _mm512_store_si512(to + 7 * apart, _mm512_or_si512(second, fourth));
    _mm512_store_si512(to + 8 * apart, high);
}

/* Writes the lines of block `n` of `vectors` vectors of tokens from `token` on, with zeros after the last token. */
static ALWAYS_INLINE void write_lines(const struct many_pairs *job, int64_t token, int64_t n, char *lines, const int vectors)
{
    const int64_t left = job->batch - token;
    const uint16_t *from = job->activations + token * job->apart + n * BLOCK;
    for (int v = 0; v < vectors; v++)
        for (int half = 0; half < 2; half++) {
            char *to = lines + v * 64 + half * BLOCK / 8 * PLACES * vectors * 64;
            __m512i row[16];
            UNROLLED for (int i = 0; i < 16; i++) {
                const uint16_t *at = from + (v * PAIR_LANES + i) * job->apart + half * BLOCK / 2;
                row[i] = v * PAIR_LANES + i < left ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
            }
            turn_16(row);
            UNROLLED for (int group = 0; group < 8; group++)
                write_pairs(row[2 * group], row[2 * group + 1], to + group * PLACES * vectors * 64, vectors * 64);
        }
}

/* The places of the lines of a row's groups, four bits each. */
static ALWAYS_INLINE uint64_t places_of(uint64_t code)
{
    return (code & 0x3333333333333333) + (code >> 1 & 0x6666666666666666);
}

/* The integers of a block as bf16, which are exact. */
static ALWAYS_INLINE void read_steps(const char *block, int32_t number, char *to)
{
    const __m256i bytes = number == I4 ? load_nibbles(block + HEADER_I4) : _mm256_loadu_si256((const __m256i *)(block + HEADER_I8));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* Adds the products of a block of some rows, `apart` bytes from each other, with a tile. */
static ALWAYS_INLINE void add_rows(const char *block, int64_t apart, int32_t number, const char *lines,
                                   float (*sums)[PAIR_TOKENS], int first, const int integers, const int vectors, const int rows)
{
    char room[PAIR_ROWS][BLOCK];
    uint64_t places[PAIR_ROWS];
    __m512 sum[PAIR_ROWS][PAIR_VECTORS];
    UNROLLED for (int r = 0; r < rows; r++) {
        places[r] = places_of(read_code(block + r * apart));
        if (integers)
            read_steps(block + r * apart, number, room[r]);
        UNROLLED for (int v = 0; v < vectors; v++)
            sum[r][v] = first || integers ? _mm512_setzero_ps() : _mm512_load_ps(sums[r] + v * PAIR_LANES);
    }
    UNROLLED for (int group = 0; group < BLOCK / 4; group++)
        UNROLLED for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, (integers ? room[r] : block + r * apart + CODE) + 4 * group, sizeof pair);
            const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
            const char *line = lines + (group * PLACES + (places[r] >> 4 * group & 15)) * (vectors * 64);
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], w, (__m512bh)_mm512_load_si512(line + v * 64));
        }
    UNROLLED for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(integers ? read_scale(block + r * apart, number) : 1.0f);
        UNROLLED for (int v = 0; v < vectors; v++) {
            float *to = sums[r] + v * PAIR_LANES;
            if (integers)
                sum[r][v] = _mm512_fmadd_ps(sum[r][v], scale, first ? _mm512_setzero_ps() : _mm512_load_ps(to));
            _mm512_store_ps(to, sum[r][v]);
        }
    }
}

/* Rounds sums, (rows, tokens), and writes them, (tokens, rows), 16 x 16 at a time. */
static void write_sums(const struct many_pairs *job, int64_t row, int rows, int64_t token, int tokens,
                       float (*sums)[PAIR_TOKENS])
{
    const struct weights *weights = job->weights;
    for (int r = 0; r < rows; r += 16) {
        const int many = (int)smaller(16, rows - r);
        const __mmask16 some = (__mmask16)((1u << many) - 1);
        float bias[16] = {0};
        for (int i = 0; weights->bias && i < many; i++)
            bias[i] = read_number(weights->bias, row + r + i, weights->bias_number);
        for (int t = 0; t < tokens; t += 16) {
            __m512i line[16];
            UNROLLED for (int i = 0; i < 16; i++)
                line[i] = _mm512_load_si512(sums[r + i] + t); /* there is room for whole chunks */
            turn_16(line);
            uint16_t *to = job->output + (token + t) * weights->rows + row + r;
            UNROLLED for (int i = 0; i < 16; i++)
                if (t + i < tokens) {
                    const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(line[i]), _mm512_loadu_ps(bias));
                    _mm256_mask_storeu_epi16(to + i * weights->rows, some, (__m256i)_mm512_cvtneps_pbh(sum));
                }
        }
    }
}

/* The products of `rows` rows from `row` on with the tokens of `vectors` vectors from `token` on. */
static ALWAYS_INLINE void multiply_tile(const struct many_pairs *job, int64_t row, int rows, int64_t token,
                                        float (*sums)[PAIR_TOKENS], const int integers, const int vectors)
{
    const struct weights *weights = job->weights;
    const int64_t size = block_bytes(weights), apart = weights->count * size;
    char lines[PAIR_LINES * PAIR_TOKENS * 4] __attribute__((aligned(64)));
    for (int64_t n = 0; n < weights->count; n++) {
        write_lines(job, token, n, lines, vectors);
        const char *block = weights->blocks + row * apart + n * size;
        for (int r = 0; r < rows; r += PAIR_ROWS, block += PAIR_ROWS * apart) {
            for (int i = 0; i < PAIR_ROWS; i++) { /* outside of the weight it does no harm */
                const uintptr_t ahead = (uintptr_t)block + (uintptr_t)((PAIR_AHEAD + i) * apart);
                __builtin_prefetch((const char *)ahead);
                __builtin_prefetch((const char *)(ahead + (uintptr_t)(size - 1)));
            }
            if (rows - r >= PAIR_ROWS)
                add_rows(block, apart, weights->number, lines, sums + r, n == 0, integers, vectors, PAIR_ROWS);
            else
                add_rows(block, apart, weights->number, lines, sums + r, n == 0, integers, vectors, 1);
        }
    }
    write_sums(job, row, rows, token, (int)smaller(vectors * PAIR_LANES, job->batch - token), sums);
}

/* The products of some tiles with chunks of rows: the chunks of a tile follow each other. */
static void multiply_pairs(const void *own, int64_t first, int64_t last)
{
    const struct many_pairs *job = own;
    const int64_t vectors = (job->batch + PAIR_LANES - 1) / PAIR_LANES, tiles = (vectors + PAIR_VECTORS - 1) / PAIR_VECTORS;
    float sums[PAIR_CHUNK][PAIR_TOKENS] __attribute__((aligned(64)));
    for (int64_t item = first; item < last; item++) {
        const int64_t tile = item / job->chunks, row = item % job->chunks * job->chunk;
        const int64_t before = tile * vectors / tiles, token = before * PAIR_LANES; /* tiles differ by one vector at most */
        const int rows = (int)smaller(job->chunk, job->weights->rows - row);
        const int integers = are_integers(job->weights), many = (int)((tile + 1) * vectors / tiles - before);
        switch (integers * PAIR_VECTORS + many) {
#define MULTIPLY(integers, many)                                                                                       \
    case integers * PAIR_VECTORS + many: multiply_tile(job, row, rows, token, sums, integers, many); break;
            MULTIPLY(0, 1)
            MULTIPLY(0, 2)
            MULTIPLY(0, 3)
            MULTIPLY(0, 4)
            MULTIPLY(1, 1)
            MULTIPLY(1, 2)
            MULTIPLY(1, 3)
            MULTIPLY(1, 4)
#undef MULTIPLY
        }
    }
}
