/* AVX512-BF16: products of pairs of bf16, added in fp32. Wherever it is, so are VBMI, VBMI2 and VNNI, except on Cooper Lake.
 * AMX-BF16: products of tiles of these; where it is, so is all else. */
#if defined(__x86_64__)
#include "library.h"
#include <immintrin.h>
#include <math.h>

#define FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,bmi,bmi2,popcnt"

BEGIN_TARGET(FEATURES)

#include "product/avx512_codes.h"
#include "product/vectors_256.h"

/* The channels of the 32 kept ones: see `positions` in avx512.h. Only the lowest six bits count. */
static ALWAYS_INLINE __m512i positions(uint64_t code)
{
    static const uint16_t groups[32] __attribute__((aligned(64))) = {0,  0,  4,  4,  8,  8,  12, 12, 16, 16, 20,
                                                                     20, 24, 24, 28, 28, 32, 32, 36, 36, 40, 40,
                                                                     44, 44, 48, 48, 52, 52, 56, 56, 60, 60};
    static const uint16_t fields[32] __attribute__((aligned(64))) = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                                     22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                                     44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(fields), _mm512_set1_epi64((int64_t)code));
    return add_groups(shifted, _mm512_set1_epi16(3), _mm512_load_si512(groups));
}

/* What two rows keep of the groups of 32 channels: in each lane of 128 bits, two groups, the bytes of four channels of the
 * first row and of four of the second. The byte is twice the position, plus 8 for the second group, plus 0 or 1. */
static ALWAYS_INLINE __m512i index_in_groups(__m512i codes, int step)
{
/* Twice the positions of four channels: their bits start one bit before their fields. */
#define FIELDS(bit) bit - 1, bit - 1, bit + 1, bit + 1, bit + 3, bit + 3, bit + 5, bit + 5
    static const int8_t fields[2][64] __attribute__((aligned(64))) = {
        {FIELDS(0), FIELDS(0), FIELDS(8), FIELDS(8), FIELDS(16), FIELDS(16), FIELDS(24), FIELDS(24)},
        {FIELDS(32), FIELDS(32), FIELDS(40), FIELDS(40), FIELDS(48), FIELDS(48), FIELDS(56), FIELDS(56)}};
#undef FIELDS
    const __m512i bytes = _mm512_set4_epi32(0x09080908, 0x01000100, 0x09080908, 0x01000100);
    return add_groups(_mm512_multishift_epi64_epi8(_mm512_load_si512(fields[step]), codes), _mm512_set1_epi8(6), bytes);
}

#define STAGED uint16_t
#define LANES 32
#define VECTOR __m512i
#define SUM __m512
#define LOAD(p) _mm512_loadu_si512(p)
#define EXPAND(p, bits) _mm512_maskz_expand_epi16((__mmask32)(bits), KEPT(p))
#define ZERO() _mm512_setzero_ps()
#define FMA(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))
#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define INDEX __m512i
#define PICK(low, index, high) _mm512_permutex2var_epi16(low, index, high)
#define MASK_PLACES __m512i
#define DECODE_MASK(code) channels_of(code)
#define AT_MASK(places, step) ((void)(step), _mm512_cvtepu8_epi16(_mm512_castsi512_si256(places)))
#define POSITIONS_PLACES uint64_t
#define DECODE_POSITIONS(code) (code)
#define AT_POSITIONS(places, step) ((void)(step), positions(places))
#define CODES __m512i
#define TWO_CODES(first, second) two_codes(first, second)
#define INDEX_IN_GROUPS(codes, step) index_in_groups(codes, step)
#define PICK_IN_GROUPS(channels, index) _mm512_shuffle_epi8(channels, index)
#define ALTERNATE(first, second, half) alternate(first, second, half)
#define TOTAL_OF_ROW(sum, row) total_of_row(sum, row)

#define KIND pairs
#define WEIGHT uint16_t
#define KEPT(p) _mm512_loadu_si512(p)
#define HALF __m512i
#define READ_HALF(p) KEPT(p)
#define PART(half, step) ((void)(step), half)
#include "product/family.h"

#include "product/many_pairs.h"

END_TARGET

BEGIN_TARGET(FEATURES ",amx-tile,amx-bf16")
#include "product/tile_layout.h"

#include "product/many_tiles.h"

#include "attention/tiles.h"
END_TARGET

const struct pair_kernels avx512_pairs = {product_pairs, dense_pairs, turn_tiles, multiply_pairs};

const struct tile_kernels amx_tiles = {lay_out_tokens, multiply_tiles, attend_tiles};
#endif
