/* AVX512-BF16: products of pairs of bf16, added in fp32. Wherever it is, so are VBMI2 and VNNI, except on Cooper Lake. */
#if defined(__x86_64__)
#include "packed.h"
#include "x86.h"
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,bmi,bmi2,popcnt")

/* The positions of the ones in 64 bits, of which 32 are set. */
static ALWAYS_INLINE __m512i indices(uint64_t bits)
{
    static const uint8_t counting[64] __attribute__((aligned(64))) = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    __m512i kept = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(counting));
    return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(kept));
}

#define STAGED uint16_t
#define LANES 32
#define VECTOR __m512i
#define SUM __m512
#define INDEX __m512i
#define LOAD(p) _mm512_loadu_si512(p)
#define EXPAND(p, bits) _mm512_maskz_expand_epi16((__mmask32)(bits), KEPT(p))
#define ZERO() _mm512_setzero_ps()
#define FMA(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))
#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define INDICES(bits) indices(bits)
#define PICK(low, index, high) _mm512_permutex2var_epi16(low, index, high)

#define KIND pairs
#define WEIGHT uint16_t
#define KEPT(p) _mm512_loadu_si512(p)
#include "family.h"

END_TARGET

void avx512_pairs(const struct job *job, int64_t first, int64_t last) { product_pairs(job, first, last); }

void avx512_dense_pairs(const struct job *job, int64_t first, int64_t last) { dense_pairs(job, first, last); }

int avx512_pairs_run_here(void) { return has_avx512_bf16(); }
#endif
