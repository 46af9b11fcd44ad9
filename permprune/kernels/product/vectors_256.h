/* Vectors of 256 bits, for AVX2 and AVX-512, inside BEGIN_TARGET and END_TARGET. */

/* The sum of 8 floats. */
static ALWAYS_INLINE float total_8(__m256 sum)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* The transpose of 8 x 8 floats. */
static ALWAYS_INLINE void turn_8(const float *from, int64_t apart, float *to, int64_t to_apart)
{
    __m256 row[8], part[8];
    UNROLLED for (int i = 0; i < 8; i++)
        row[i] = _mm256_loadu_ps(from + i * apart);
    UNROLLED for (int i = 0; i < 8; i += 2) {
        part[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        part[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm256_shuffle_ps(part[i + j], part[i + j + 2], 0x44);
            row[i + 2 * j + 1] = _mm256_shuffle_ps(part[i + j], part[i + j + 2], 0xee);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_apart, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_apart, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
    }
}

/* 32 integers of four bits. */
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
