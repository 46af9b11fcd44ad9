/* Attention with AVX2, after product/avx2.h. */
static ALWAYS_INLINE __m256 read_half(const char *from, const int number)
{
    switch (number) {
    case F32: return _mm256_loadu_ps((const float *)from);
    case BF16: return widen_bf16((const uint16_t *)from);
    case F16: return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
    default: return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
    }
}

static ALWAYS_INLINE lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
{
    __m256 half[2];
    memcpy(half, &rest, sizeof half);
    half[0] = expand(read_half(from, number), bits, half[0]);
    from += __builtin_popcount(bits & 255) * value_bytes(1, number);
    half[1] = expand(read_half(from, number), bits >> 8, half[1]);
    memcpy(&rest, half, sizeof half);
    return rest;
}

static ALWAYS_INLINE bytes look_up(const int8_t *table, bytes places)
{
    return (bytes)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), (__m128i)places);
}

#include "attention/kernels.h"
