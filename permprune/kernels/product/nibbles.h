/* Integers of four bits, in vectors of 256 bits. */
static ALWAYS_INLINE __m256i load_nibbles(const char *pairs)
{
    __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)pairs));
    __m256i apart = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
    return _mm256_sub_epi8(_mm256_and_si256(apart, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

static ALWAYS_INLINE void unpack_nibbles(const uint8_t *pairs, int8_t *to)
{
    for (int half = 0; half < BLOCK; half += 32)
        _mm256_storeu_si256((__m256i *)(to + half), load_nibbles((const char *)pairs + half / 2));
}
#define UNPACK_NIBBLES(pairs, to) unpack_nibbles(pairs, to);
