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

static ALWAYS_INLINE lanes flip(lanes values, uint32_t bits)
{
    __m512i bits_of_values = (__m512i)values;
    return (lanes)_mm512_mask_xor_epi32(bits_of_values, (__mmask16)bits, bits_of_values, _mm512_set1_epi32(INT32_MIN));
}

/* Numbers become bytes in one register, and what they stand for by a table of 16, or by equal steps. */
static ALWAYS_INLINE void unpack_coded(float *to, const uint64_t *planes, const int bits, int64_t lines)
{
    const int step = bits > 4 ? 8 - bits : 0;
    __m512i all = _mm512_set1_epi8((char)(bits > 4 ? -((1 << 7) - (1 << (7 - bits))) : 0));
    UNROLLED for (int plane = 0; plane < bits; plane++)
        all = _mm512_mask_add_epi8(all, planes[plane], all, _mm512_set1_epi8((char)(1 << (plane + step))));
    if (bits <= 4)
        all = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)numbered[bits - 2])), all);
    UNROLLED for (int i = 0; i < 4; i++)
        if (i < lines)
            _mm512_storeu_ps(to + i * LINE, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter_of(all, i))));
}

static ALWAYS_INLINE uint64_t deposit(uint64_t bits, uint64_t places) { return _pdep_u64(bits, places); }

#define HAS_BLOCKS
#define HAS_CODED
#define HAS_DEPOSIT
#include "attention/kernels.h"
