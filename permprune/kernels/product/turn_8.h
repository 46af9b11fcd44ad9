/* The transpose of 8 x 8 floats with AVX. */
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
