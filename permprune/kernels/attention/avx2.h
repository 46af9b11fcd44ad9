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

/* Two lines at a time: their bits of a plane are spread to bytes, and what numbers stand for is read from a table of 16, or
 * rises by equal steps. */
static ALWAYS_INLINE void unpack_coded(float *to, const uint64_t *planes, const int bits, int64_t lines)
{
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const int step = bits > 4 ? 8 - bits : 0;
    for (int64_t i = 0; i < lines; i += 2, to += 2 * LINE) {
        __m256i all = _mm256_setzero_si256();
        UNROLLED for (int plane = 0; plane < bits; plane++) {
            const __m256i word = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)(planes[plane] >> i * LINE)), places);
            const __m256i one = _mm256_cmpeq_epi8(_mm256_and_si256(word, bit), bit);
            all = _mm256_or_si256(all, _mm256_and_si256(one, _mm256_set1_epi8((char)(1 << (plane + step)))));
        }
        if (bits <= 4)
            all = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)numbered[bits - 2])), all);
        else
            all = _mm256_sub_epi8(all, _mm256_set1_epi8((char)((1 << 7) - (1 << (7 - bits)))));
        const __m128i line[2] = {_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)};
        UNROLLED for (int half = 0; half < 2; half++)
            if (i + half < lines) {
                float *first = to + half * LINE;
                _mm256_storeu_ps(first, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(line[half])));
                _mm256_storeu_ps(first + 8, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(line[half], 8))));
            }
    }
}

#define HAS_CODED
#include "attention/kernels.h"
