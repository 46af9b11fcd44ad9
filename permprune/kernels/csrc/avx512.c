/* AVX-512 as Ice Lake and Zen 4 have it: VBMI and VBMI2 to permute and compress lanes of 8 bits, and VNNI. */
#if defined(__x86_64__)
#include "packed.h"
#include "search.h"
#include "x86.h"
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "avx512.h"

static ALWAYS_INLINE __m256i load_16(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

static ALWAYS_INLINE __m256i half_of(__m512i v, int upper)
{
    return upper ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
}

static ALWAYS_INLINE __m512 widen_bf16(__m256i v)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

/* The channels of lanes 16 step to 16 step + 15 of the kept ones, among the 32 channels from 32 step on: the positions in
 * their groups of four, to which each pair of lanes adds the first channel of its group. Only the lowest five bits
 * count. */
static ALWAYS_INLINE __m512i positions(uint64_t code, int step)
{
    const __m512i fields = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512i shifted = _mm512_multishift_epi64_epi8(fields, _mm512_set1_epi64((int64_t)(code >> 32 * step)));
    return add_groups(shifted, _mm512_set1_epi32(3), groups);
}

static ALWAYS_INLINE __m512i masked(__m512i channels, int step)
{
    return _mm512_cvtepu8_epi32(step ? _mm512_extracti32x4_epi32(channels, 1) : _mm512_castsi512_si128(channels));
}

#define STAGED float
#define LANES 16
#define VECTOR __m512
#define SUM __m512
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define EXPAND(p, bits) _mm512_maskz_expand_ps((__mmask16)(bits), KEPT(p))
#define ZERO() _mm512_setzero_ps()
#define FMA(sum, w, x) _mm512_fmadd_ps(w, x, sum)
#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define INDEX __m512i
#define PICK(low, index, high) _mm512_permutex2var_ps(low, index, high)
#define MASK_PLACES __m512i
#define DECODE_MASK(code) channels_of(code)
#define AT_MASK(places, step) masked(places, step)
#define POSITIONS_PLACES uint64_t
#define DECODE_POSITIONS(code) (code)
#define AT_POSITIONS(places, step) positions(places, step)

#define KIND f32
#define WEIGHT float
#define KEPT(p) _mm512_loadu_ps(p)
#define HALF const float *
#define READ_HALF(p) (p)
#define PART(half, step) KEPT((half) + (step) * LANES)
#include "family.h"

#define KIND bf16
#define WEIGHT uint16_t
#define KEPT(p) widen_bf16(load_16(p))
#define HALF __m512i
#define READ_HALF(p) _mm512_loadu_si512(p)
#define PART(half, step) widen_bf16(half_of(half, step))
#include "family.h"

#define KIND f16
#define WEIGHT uint16_t
#define KEPT(p) _mm512_cvtph_ps(load_16(p))
#define HALF __m512i
#define READ_HALF(p) _mm512_loadu_si512(p)
#define PART(half, step) _mm512_cvtph_ps(half_of(half, step))
#include "family.h"

#undef VECTOR
#undef LOAD
#undef SUM
#undef ZERO
#undef SCALE
#undef TOTAL

/* ---- int8, half of it kept: unsigned |w| by signed x sign(w), on the 32 channels that are picked ---- */

typedef struct {
    __m256i w;
    __m512i index; /* of the channel of each byte of w; the upper half is undefined */
} half_block;

static ALWAYS_INLINE half_block read_half(const char *block)
{
    const __m256i fields = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40,
                                            42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
    const __m256i groups = _mm256_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28, 32, 32, 36, 36, 40,
                                            40, 44, 44, 48, 48, 52, 52, 56, 56, 60, 60);
    __m256i shifted = _mm256_multishift_epi64_epi8(fields, _mm256_set1_epi64x((int64_t)read_code(block)));
    __m256i index = _mm256_ternarylogic_epi64(groups, shifted, _mm256_set1_epi8(3), OR_AND);
    return (half_block){_mm256_loadu_si256((const __m256i *)(block + HEADER_I8)), _mm512_castsi256_si512(index)};
}

static ALWAYS_INLINE __m256i dot_half(half_block half, __m512i x)
{
    __m256i picked = _mm512_castsi512_si256(_mm512_permutexvar_epi8(half.index, x));
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(half.w), _mm256_sign_epi8(picked, half.w));
}

static ALWAYS_INLINE float total_half(__m256 sum)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#define VECTOR __m512i
#define LOAD(p) _mm512_loadu_si512(p)

#define SUM __m256
#define ZERO() _mm256_setzero_ps()
#define DOT(shift, w, x) ((void)(shift), dot_half(w, x))
#define SCALE(sum, count, scale) _mm256_fmadd_ps(_mm256_cvtepi32_ps(count), _mm256_set1_ps(scale), sum)
#define TOTAL(sum) total_half(sum)
#define NAME half_i8
#define HEADER HEADER_I8
#define SCALE_OF(weights, block, number) read_scale(block)
#define FACTORS half_block
#define READ(block, kind, end, room) ((void)(end), (void)(room), read_half(block))
#include "product_i8.h"
#define HALF_I8

#undef SUM
#undef ZERO
#undef DOT
#undef SCALE
#undef TOTAL

/* ---- int8, any pattern ---- */

#define SUM __m512
#define ZERO() _mm512_setzero_ps()
#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define EXPAND_BLOCK(p, bits) _mm512_maskz_expand_epi8(bits, LOAD(p))
#define FACTOR(w) _mm512_xor_si512(w, _mm512_set1_epi8(-128))
#define DOT(shift, w, x) _mm512_dpbusd_epi32(_mm512_zextsi128_si512(_mm_cvtsi32_si128(shift)), w, x)
#define SCALE(sum, count, scale) _mm512_fmadd_ps(_mm512_cvtepi32_ps(count), _mm512_set1_ps(scale), sum)
#include "family_i8.h"

END_TARGET

const struct kernels avx512_kernels = {
    .name = "avx512",
    .search = &avx512_search,
    .runs_here = has_avx512,
    ALL_KERNELS,
    .pairs_run_here = avx512_pairs_run_here,
    .pairs = avx512_pairs,
    .dense_pairs = avx512_dense_pairs,
};
#endif
