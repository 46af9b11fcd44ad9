/* The kernels of int8, `product_i8`, `unpack_i8` and `dense_i8`, and ALL_KERNELS, once family.h has made those of floats.
 *
 * Expects the types VECTOR (WORD int8, and nothing else) and SUM (float lanes); LOAD(const int8_t *), a VECTOR;
 * EXPAND_WORD(const int8_t *, uint64_t bits), the next values put where `bits` has ones and zeros between;
 * DOT(int32_t shift, VECTOR w, VECTOR x), int32 lanes that add up to the product of a word; ZERO(),
 * SCALE(SUM, lanes, float) and TOTAL(SUM).
 *
 * Where a processor multiplies unsigned by signed bytes, FACTOR(w) gives DOT w + 128, and DOT makes up for that with
 * `shift`, -128 times the sum of x.
 */
#ifndef FACTOR
#define FACTOR(w) (w)
#endif
#define MASK_WORD mask_word
#define WEIGHTS(p, bits) FACTOR(EXPAND_WORD(p, bits))
#define NAME product_i8
#include "product_i8.h"
#undef MASK_WORD
#undef WEIGHTS

#define MASK_WORD(mask, word) ((void)(mask), ~0ull)
#define WEIGHTS(p, bits) FACTOR(LOAD(p))
#define NAME dense_i8
#include "product_i8.h"
#undef MASK_WORD
#undef WEIGHTS

static void unpack_i8(const struct job *job, int64_t first, int64_t last)
{
    const struct weights *weights = job->weights;
    const int64_t blocks = (weights->words + weights->block - 1) / weights->block;
    const int8_t *end = (const int8_t *)weights->values + weights->rows * weights->kept;
    int8_t room[WORD], integers[WORD];
    float line[WORD];
    for (int64_t row = first; row < last; row++) {
        const int8_t *values = (const int8_t *)weights->values + row * weights->kept;
        for (int64_t word = 0; word < weights->words; word++) {
            uint64_t bits = mask_word(weights->mask + row * weights->words * 8, word);
            float scale = weights->scale[row * blocks + word / weights->block];
            VECTOR expanded = EXPAND_WORD((const int8_t *)readable(values, end, room, 1), bits);
            memcpy(integers, &expanded, WORD);
            for (int c = 0; c < WORD; c++)
                line[c] = integers[c] * scale;
            values += __builtin_popcountll(bits);
            write_line(job, row, word * WORD, line);
        }
    }
}

#define ALL_KERNELS                                                                                                   \
    .products = {[F32] = product_f32, [BF16] = product_bf16, [F16] = product_f16, [I8] = product_i8},                  \
    .dense = {[F32] = dense_f32, [BF16] = dense_bf16, [F16] = dense_f16, [I8] = dense_i8},                             \
    .unpack = {[F32] = unpack_f32, [BF16] = unpack_bf16, [F16] = unpack_f16, [I8] = unpack_i8}
