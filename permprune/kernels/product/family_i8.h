/* The kernels of int8, `stage_i8`, `product_i8`, `unpack_i8` and `dense_i8`, once family.h has made those of floats.
 *
 * Expects the types VECTOR (BLOCK int8, and nothing else) and SUM (float lanes); LOAD(const int8_t *), a VECTOR;
 * EXPAND_BLOCK(const int8_t *, uint64_t bits), the next values put where `bits` has ones and zeros between;
 * DOT(int32_t shift, VECTOR w, VECTOR x), int32 lanes that add up to the product of a block; ZERO(),
 * SCALE(SUM, lanes, float w_scale, float x_scale), which adds the lanes times both; and TOTAL(SUM).
 *
 * Where a processor multiplies unsigned by signed bytes, FACTOR(w) gives DOT w + 128, and DOT makes up for that with
 * `shift`, -128 times the sum of x.
 *
 * If HALF_I8 is defined, `half_i8` multiplies weights with POSITIONS, and `two_rows_i8` the most rows of them in batches.
 */
#ifndef FACTOR
#define FACTOR(w) (w)
#endif
#define NAME expand_i8_blocks
#define HEADER HEADER_I8
#define SCALE_OF(weights, block, number) read_scale(block)
#define FACTORS VECTOR
#define READ(block, kind, end, room)                                                                                   \
    FACTOR(EXPAND_BLOCK(readable((block) + HEADER_I8, end, room, 1), kept_channels(read_code(block), kind)))
#include "product/product_i8.h"

#define NAME dense_i8
#define HEADER 0
#define SCALE_OF(weights, block, number) (weights)->scale[number]
#define FACTORS VECTOR
#define READ(block, kind, end, room) ((void)(end), (void)(room), FACTOR(LOAD((const int8_t *)(block))))
#include "product/product_i8.h"

/* Rounds a block to integers from -127 to 127 and returns its scale. Of numbers that are not finite, any integers come. */
static float quantize_block(const float *from, int8_t *to, int32_t *shift)
{
    uint32_t largest = 0;
    for (int c = 0; c < BLOCK; c++) {
        uint32_t magnitude = to_bits(from[c]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float limit = from_bits(largest);
    float inverse = limit > 1e-30f ? 127.0f / limit : 0.0f;
    int32_t sum = 0;
    for (int c = 0; c < BLOCK; c++) { /* adding 1.5 x 2^23 rounds to the nearest integer, ties to even */
        to[c] = (int8_t)to_bits(from[c] * inverse + 12582912.0f);
        sum += to[c];
    }
    *shift = -128 * sum;
    return limit / 127.0f;
}

/* Rounds a row of floats: block n becomes number `place` + n x `apart` of the staged ones. */
static void stage_i8(const float *line, int64_t count, const struct staged *staged, int64_t place, int64_t apart)
{
    int8_t *values = staged->values;
    for (int64_t n = 0; n < count; n++, line += BLOCK, place += apart)
        staged->scale[place] = quantize_block(line, values + place * BLOCK, staged->shift + place);
}

static void product_i8(const void *own, int64_t first, int64_t last)
{
#ifdef HALF_I8
    const struct product *job = own;
    if (job->weights->kind == POSITIONS) {
        if (job->staged->batch > 1)
            first = two_rows_i8(job, first, last);
        half_i8(job, first, last);
        return;
    }
#endif
    expand_i8_blocks(own, first, last);
}

static void unpack_i8(const void *own, int64_t first, int64_t last)
{
    const struct product *job = own;
    const struct weights *weights = job->weights;
    const int64_t size = HEADER_I8 + weights->slots;
    const char *block = weights->blocks + first * weights->count * size;
    const char *end = weights->blocks + weights->rows * weights->count * size;
    int8_t room[BLOCK], integers[BLOCK];
    float line[BLOCK];
    for (int64_t row = first; row < last; row++)
        for (int64_t n = 0; n < weights->count; n++, block += size) {
            uint64_t bits = kept_channels(read_code(block), weights->kind);
            VECTOR expanded = EXPAND_BLOCK(readable(block + HEADER_I8, end, room, 1), bits);
            memcpy(integers, &expanded, BLOCK);
            for (int c = 0; c < BLOCK; c++)
                line[c] = (float)integers[c] * read_scale(block);
            write_line(job, row, n * BLOCK, line);
        }
}
