/* The kernels of the pruned cache, for processors with AVX2. */
#if defined(__x86_64__)
#include "attention/cache.h"
#include "product/expand_table.h"
#include "attention/deposit.h"
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,popcnt")

static ALWAYS_INLINE __m256 read_half(const char *from, const int number)
{
    switch (number) {
    case F32: return _mm256_loadu_ps((const float *)from);
    case BF16: {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    case F16: return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
    default: return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
    }
}

static ALWAYS_INLINE __m256 expand_half(__m256 kept, uint32_t bits, __m256 rest)
{
    __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)expand_bytes[bits & 255]));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(kept, index), rest, _mm256_castsi256_ps(index));
}

static ALWAYS_INLINE lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
{
    __m256 half[2];
    memcpy(half, &rest, sizeof half);
    half[0] = expand_half(read_half(from, number), bits, half[0]);
    from += __builtin_popcount(bits & 255) * value_bytes(1, number);
    half[1] = expand_half(read_half(from, number), bits >> 8, half[1]);
    memcpy(&rest, half, sizeof half);
    return rest;
}

static ALWAYS_INLINE bytes look_up(const uint8_t *table, bytes places)
{
    return (bytes)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), (__m128i)places);
}

static ALWAYS_INLINE lanes flip(lanes values, uint32_t bits)
{
    const numbers places = {31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16};
    return (lanes)((numbers)values ^ (((int32_t)bits - (numbers){0}) << places & INT32_MIN));
}

#define NAME avx2
#include "attention/kernels.h"

END_TARGET
#endif
