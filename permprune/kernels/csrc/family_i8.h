/* The products of int8, `product_i8` and `dense_i8`, and ALL_PRODUCTS, once family.h has made those of floats.
 *
 * Expects the types VECTOR (WORD int8) and SUM (float lanes); LOAD(const int8_t *), a VECTOR; EXPAND_WORD(const int8_t *,
 * uint64_t bits), the next values put where `bits` has ones and zeros between; DOT(int32_t shift, VECTOR w, VECTOR x),
 * int32 lanes that add up to the product of a word; ZERO(), SCALE(SUM, lanes, float) and TOTAL(SUM).
 *
 * Where a processor multiplies unsigned by signed bytes, LOAD_WEIGHT(p) and EXPAND_WORD give w + 128, and DOT makes up
 * for it with `shift`, -128 times the sum of x.
 */
#define MASK_WORD mask_word
#define WEIGHTS EXPAND_WORD
#define NAME product_i8
#include "product_i8.h"
#undef MASK_WORD
#undef WEIGHTS

#ifndef LOAD_WEIGHT
#define LOAD_WEIGHT LOAD
#endif
#define MASK_WORD(mask, word) ((void)(mask), ~0ull)
#define WEIGHTS(p, bits) LOAD_WEIGHT(p)
#define NAME dense_i8
#include "product_i8.h"
#undef MASK_WORD
#undef WEIGHTS

#define ALL_PRODUCTS                                                                                                   \
    .products = {[F32] = product_f32, [BF16] = product_bf16, [F16] = product_f16, [I8] = product_i8},                  \
    .dense = {[F32] = dense_f32, [BF16] = dense_bf16, [F16] = dense_f16, [I8] = dense_i8}
