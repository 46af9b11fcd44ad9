/* How AVX-512 reads codes, inside BEGIN_TARGET and END_TARGET. */
enum { OR_AND = 0xf8, AND_OF_OR = 0xa8, SELECT = 0xca }; /* of ternarylogic: a | (b & c), (a | b) & c, a ? b : c */

/* The channels that a mask keeps, in the first 32 bytes. */
static ALWAYS_INLINE __m512i channels_of(uint64_t mask)
{
    static const uint8_t counting[64] __attribute__((aligned(64))) = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    return _mm512_maskz_compress_epi8(mask, _mm512_load_si512(counting));
}

/* Some positions of two bits, the lowest of each lane of `shifted`, plus the first channel of each lane's group. */
static ALWAYS_INLINE __m512i add_groups(__m512i shifted, __m512i three, __m512i groups)
{
    return _mm512_ternarylogic_epi64(groups, shifted, three, OR_AND);
}

/* ---- for two_rows.h: of each 128 bits, the lower 64 belong to the first row, the upper to the second ---- */

#define TWO_ROWS_FROM (TILE_BATCH + 1) /* before, picking from two vectors is faster */

static ALWAYS_INLINE __m512i two_codes(const char *first, const char *second)
{
    return _mm512_mask_set1_epi64(_mm512_set1_epi64((int64_t)read_code(first)), 0xaa, (int64_t)read_code(second));
}

/* The lower or upper halves of two vectors, 64 bits of each in turns. */
static ALWAYS_INLINE __m512i alternate(__m512i first, __m512i second, int upper)
{
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    return _mm512_permutex2var_epi64(first, upper ? high : low, second);
}

enum { SECOND_ROW = 0xcccc }; /* lanes of 32 bits */

static ALWAYS_INLINE float total_of_row(__m512 sum, int row)
{
    return _mm512_mask_reduce_add_ps((__mmask16)(row ? SECOND_ROW : ~SECOND_ROW), sum);
}
