/* AVX-512 as Ice Lake and Zen 4 have it: VBMI2 to expand and compress lanes of 8 and 16 bits, and VNNI. */
#if defined(__x86_64__)
#include "packed.h"
#include "search.h"
#include "x86.h"
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt")

static ALWAYS_INLINE __m256i load_16(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

static ALWAYS_INLINE __m512 widen_bf16(__m256i v)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

/* The positions of the ones in 32 bits. */
static ALWAYS_INLINE __m512i indices(uint64_t bits)
{
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                           22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    __m512i kept = _mm512_maskz_compress_epi16((__mmask32)bits, _mm512_cvtepu8_epi16(bytes));
    return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(kept));
}

#define STAGED float
#define LANES 16
#define VECTOR __m512
#define SUM __m512
#define INDEX __m512i
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define EXPAND(p, bits) _mm512_maskz_expand_ps((__mmask16)(bits), KEPT(p))
#define ZERO() _mm512_setzero_ps()
#define FMA(sum, w, x) _mm512_fmadd_ps(w, x, sum)
#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define INDICES(bits) indices(bits)
#define PICK(low, index, high) _mm512_permutex2var_ps(low, index, high)

#define KIND f32
#define WEIGHT float
#define KEPT(p) _mm512_loadu_ps(p)
#include "family.h"

#define KIND bf16
#define WEIGHT uint16_t
#define KEPT(p) widen_bf16(load_16(p))
#include "family.h"

#define KIND f16
#define WEIGHT uint16_t
#define KEPT(p) _mm512_cvtph_ps(load_16(p))
#include "family.h"

#undef VECTOR
#undef LOAD

#define VECTOR __m512i
#define LOAD(p) _mm512_loadu_si512(p)
#define EXPAND_WORD(p, bits) _mm512_maskz_expand_epi8(bits, LOAD(p))
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
