/* Attention with AVX-512, after product/avx512.h. */
static ALWAYS_INLINE __m512 read_line(const char *from, const int number)
{
    switch (number) {
    case F32: return _mm512_loadu_ps(from);
    case BF16: return widen_bf16(load_16((const uint16_t *)from));
    case F16: return _mm512_cvtph_ps(load_16((const uint16_t *)from));
    default: return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
    }
}

static ALWAYS_INLINE lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
{
    return (lanes)_mm512_mask_expand_ps((__m512)rest, (__mmask16)bits, read_line(from, number));
}

static ALWAYS_INLINE __m128i quarter_of(__m512i v, int i)
{
    switch (i) {
    case 0: return _mm512_castsi512_si128(v);
    case 1: return _mm512_extracti32x4_epi32(v, 1);
    case 2: return _mm512_extracti32x4_epi32(v, 2);
    default: return _mm512_extracti32x4_epi32(v, 3);
    }
}

/* Small numbers are expanded together, because expanding takes long. */
static ALWAYS_INLINE void unpack_block(float *to, const char *from, const int number, uint64_t mask, const lanes *rest)
{
    const int upper = __builtin_popcount((uint32_t)mask);
    __m512i all = _mm512_setzero_si512(), half[2] = {all, all};
    if (number == I8)
        all = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(from));
    else if (number != F32) {
        half[0] = _mm512_maskz_expand_epi16((uint32_t)mask, _mm512_loadu_si512(from));
        half[1] = _mm512_maskz_expand_epi16((uint32_t)(mask >> 32), _mm512_loadu_si512(from + 2 * upper));
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        const __mmask16 bits = (__mmask16)(mask >> i * LINE);
        const __m256i two = half_of(half[i / 2], i % 2);
        __m512 line = (__m512)rest[i];
        switch (number) {
        case F32:
            line = _mm512_mask_expand_ps(line, bits, _mm512_loadu_ps(from));
            from += __builtin_popcount(bits) * 4;
            break;
        case BF16: line = _mm512_mask_mov_ps(line, bits, widen_bf16(two)); break;
        case F16: line = _mm512_mask_cvtph_ps(line, bits, two); break;
        default: line = _mm512_mask_cvtepi32_ps(line, bits, _mm512_cvtepi8_epi32(quarter_of(all, i)));
        }
        _mm512_storeu_ps(to + i * LINE, line);
    }
}

static ALWAYS_INLINE bytes look_up(const uint8_t *table, bytes places)
{
    return (bytes)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), (__m128i)places);
}

static ALWAYS_INLINE lanes flip(lanes values, uint32_t bits)
{
    __m512i own = (__m512i)values;
    return (lanes)_mm512_mask_xor_epi32(own, (__mmask16)bits, own, _mm512_set1_epi32(INT32_MIN));
}

/* The places are spread to bytes in one register: each pair becomes a 16-bit number. */
static ALWAYS_INLINE void unpack_signed_block(float *to, const char *from, int64_t first, uint64_t mask, const lanes *rest,
                                              uint64_t signs)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)magnitudes));
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(from + first / 2)));
    if (first % 2) {
        __m512i next = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(from + first / 2 + 1)));
        next = _mm512_and_si512(_mm512_slli_epi16(next, 4), _mm512_set1_epi16(0xf0));
        pairs = _mm512_or_si512(_mm512_srli_epi16(pairs, 4), next);
    }
    pairs = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
    const __m512i all = _mm512_maskz_expand_epi8(mask, _mm512_shuffle_epi8(table, pairs));
    UNROLLED for (int i = 0; i < 4; i++, mask >>= LINE, signs >>= LINE) {
        __m512 line = _mm512_mask_cvtepi32_ps((__m512)rest[i], (__mmask16)mask, _mm512_cvtepi8_epi32(quarter_of(all, i)));
        _mm512_storeu_ps(to + i * LINE, (__m512)flip((lanes)line, signs & 0xffff));
    }
}

static ALWAYS_INLINE uint64_t deposit(uint64_t bits, uint64_t places) { return _pdep_u64(bits, places); }

static ALWAYS_INLINE uint64_t deposit_pairs(uint64_t bits, uint64_t places) { return _pdep_u64(bits, places); }

#define HAS_BLOCKS
#include "attention/kernels.h"
