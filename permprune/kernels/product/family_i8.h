/* The kernels of integers, `stage_i8`, `dense_i8`, and `product_` and `unpack_` of `i8` and `i4`, once family.h has made
 * those of floats. Integers of four bits are multiplied as those of eight.
 *
 * Expects the types VECTOR (BLOCK int8, and nothing else) and SUM (float lanes); LOAD(const int8_t *), a VECTOR;
 * EXPAND_BLOCK(const int8_t *, uint64_t bits), the next values put where `bits` has ones and zeros between;
 * DOT(FACTOR_TYPE w, VECTOR x), int32 lanes that add up to the product of a block; ZERO(),
 * SCALE(SUM, lanes, float w_scale, float x_scale), which adds the lanes times both; and TOTAL(SUM). Of I4 READ_SCALES(const
 * char *block) are the SCALES of all parts, and ADD_PARTS(SUM, FACTOR_TYPE w, VECTOR x, SCALES, float x_scale) adds the
 * products of the parts times theirs.
 *
 * Where a processor multiplies unsigned by signed bytes, FACTOR(w), a FACTOR_TYPE, is what DOT takes in place of w.
 *
 * If HALF_I8 is defined, `half_i8` multiplies weights with POSITIONS. If TWO_ROWS_I8 or TWO_ROWS_I4 is defined,
 * `two_rows_` multiplies the most rows of them in batches of so many activations or more. UNPACK_NIBBLES(const uint8_t *,
 * int8_t *) may be a fast way to unpack BLOCK integers of four bits.
 */
#ifndef FACTOR
#define FACTOR(w) (w)
#define FACTOR_TYPE VECTOR
#endif
#ifndef UNPACK_NIBBLES
#define UNPACK_NIBBLES(pairs, to)                                                                                      \
    for (int i = 0; i < BLOCK / 2; i++) {                                                                              \
        (to)[2 * i] = (int8_t)(((pairs)[i] & 15) - 8);                                                                 \
        (to)[2 * i + 1] = (int8_t)(((pairs)[i] >> 4) - 8);                                                             \
    }
#endif

/* The integers of a block, from which BLOCK can be read: any follow those that it keeps. */
static ALWAYS_INLINE const int8_t *read_integers(const char *block, int32_t number, const char *end, int8_t room[BLOCK])
{
    if (number == I8)
        return readable(block + HEADER_I8, end, room, BLOCK);
    uint8_t copy[BLOCK / 2];
    const uint8_t *pairs = readable(block + HEADER_I4, end, copy, BLOCK / 2);
    UNPACK_NIBBLES(pairs, room)
    return room;
}

/* The channels of a block of I4 with POSITIONS, including zeros. */
static ALWAYS_INLINE void write_channels(const char *block, int8_t to[BLOCK])
{
    const uint8_t *pairs = (const uint8_t *)block + HEADER_I4;
    const uint64_t code = read_code(block), odd = turned(code);
    memset(to, 0, BLOCK);
    for (int group = 0; group < BLOCK / 4; group++, to += 4) {
        const int bits = (int)(code >> 4 * group), one = (int)(odd >> 4 * group & 1);
        to[bits & 3] = (int8_t)(2 * ((pairs[group] & 15) - 8) + one);
        to[bits >> 2 & 3] = (int8_t)(2 * ((pairs[group] >> 4) - 8) + one);
    }
}

static ALWAYS_INLINE VECTOR read_expanded(const struct weights *weights, int32_t number, const char *block,
                                          const char *end, int8_t room[BLOCK])
{
    if (number == I4 && weights->kind == POSITIONS) {
        write_channels(block, room);
        return LOAD(room);
    }
    const int8_t *values = read_integers(block, number, end, room);
    return EXPAND_BLOCK(values, kept_channels(read_code(block), weights->kind));
}

#define NAME expand_i8_blocks
#define SCALE_OF(weights, block, place) read_scale(block, I8, 0)
#define FACTORS FACTOR_TYPE
#define READ(weights, block, end, room) FACTOR(read_expanded(weights, I8, block, end, room))
#include "product/product_i8.h"

#define NAME expand_i4_blocks
#define SCALE_TYPE SCALES
#define SCALE_OF(weights, block, place) READ_SCALES(block)
#define ADD(sum, w, x, w_scale, x_scale) ADD_PARTS(sum, w, x, w_scale, x_scale)
#define FACTORS FACTOR_TYPE
#define READ(weights, block, end, room) FACTOR(read_expanded(weights, I4, block, end, room))
#include "product/product_i8.h"

#define NAME dense_i8
#define SCALE_OF(weights, block, place) (weights)->scale[place]
#define FACTORS FACTOR_TYPE
#define READ(weights, block, end, room) ((void)(end), (void)(room), FACTOR(LOAD((const int8_t *)(block))))
#include "product/product_i8.h"

/* Rounds a block to integers from -127 to 127 and returns its scale. Of numbers that are not finite, any integers come. */
static float quantize_block(const float *from, int8_t *to)
{
    uint32_t largest = 0;
    for (int c = 0; c < BLOCK; c++) {
        uint32_t magnitude = to_bits(from[c]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float limit = from_bits(largest);
    float inverse = limit > 1e-30f ? 127.0f / limit : 0.0f;
    for (int c = 0; c < BLOCK; c++) /* adding 1.5 x 2^23 rounds to the nearest integer, ties to even */
        to[c] = (int8_t)to_bits(from[c] * inverse + 12582912.0f);
    return limit / 127.0f;
}

/* Rounds a row of floats: block n becomes number `place` + n x `apart` of the staged ones. */
static void stage_i8(const float *line, int64_t count, const struct staged *staged, int64_t place, int64_t apart)
{
    int8_t *values = staged->values;
    for (int64_t n = 0; n < count; n++, line += BLOCK, place += apart)
        staged->scale[place] = quantize_block(line, values + place * BLOCK);
}

/* Whether weights with POSITIONS are multiplied two rows at a time. */
static ALWAYS_INLINE int takes_two_rows(const struct product *job, int64_t least)
{
    return job->weights->kind == POSITIONS && job->staged->batch >= least;
}

static void product_i8(const void *argument, int64_t first, int64_t last)
{
#ifdef TWO_ROWS_I8
    if (takes_two_rows(argument, TWO_ROWS_I8))
        first = two_rows_i8(argument, first, last);
#endif
#ifdef HALF_I8
    if (((const struct product *)argument)->weights->kind == POSITIONS) {
        half_i8(argument, first, last);
        return;
    }
#endif
    expand_i8_blocks(argument, first, last);
}

static void product_i4(const void *argument, int64_t first, int64_t last)
{
#ifdef TWO_ROWS_I4
    if (takes_two_rows(argument, TWO_ROWS_I4))
        first = two_rows_i4(argument, first, last);
#endif
    expand_i4_blocks(argument, first, last);
}

static ALWAYS_INLINE void unpack_integers(const struct product *job, int32_t number, int64_t first, int64_t last)
{
    const struct weights *weights = job->weights;
    const int plain = weights->kind == PLAIN;
    const int64_t size = plain ? BLOCK : block_bytes(weights);
    const char *block = weights->blocks + first * weights->count * size;
    const char *end = weights->blocks + weights->rows * weights->count * size;
    int8_t room[BLOCK], integers[BLOCK] __attribute__((aligned(64)));
    float line[BLOCK] __attribute__((aligned(64)));
    for (int64_t row = first; row < last; row++)
        for (int64_t n = 0; n < weights->count; n++, block += size) {
            VECTOR expanded = plain ? LOAD((const int8_t *)block) : read_expanded(weights, number, block, end, room);
            memcpy(integers, &expanded, BLOCK);
            for (int part = 0; part < BLOCK; part += PART) {
                const float scale = plain ? weights->scale[row * weights->count + n] : read_scale(block, number, part);
                for (int c = part; c < part + PART; c++)
                    line[c] = (float)integers[c] * scale;
            }
            write_line(job, row, n * BLOCK, line);
        }
}

static void unpack_i8(const void *argument, int64_t first, int64_t last) { unpack_integers(argument, I8, first, last); }

static void unpack_i4(const void *argument, int64_t first, int64_t last) { unpack_integers(argument, I4, first, last); }
