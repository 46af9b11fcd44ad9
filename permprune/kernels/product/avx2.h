/* Products with AVX2. */
#include "product/vectors_256.h"

/* Moves successive lanes to the positions of the ones in `bits`, with those of `rest` between. */
static ALWAYS_INLINE __m256 expand(__m256 kept, uint64_t bits, __m256 rest)
{
    __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)expand_bytes[bits & 255]));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(kept, index), rest, _mm256_castsi256_ps(index));
}

static ALWAYS_INLINE __m256 widen_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static ALWAYS_INLINE float total_of_row(__m256 sum, int row)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehdup_ps(four));
    return _mm_cvtss_f32(row ? _mm_movehl_ps(two, two) : two);
}

/* ---- floats, two rows that keep half: in each lane of 128 bits, a group of both ---- */

/* Of each byte, which is the code of two groups, that of the first row and then that of the second. */
typedef struct {
    uint8_t pairs[BLOCK / 4];
} two_codes;

static ALWAYS_INLINE two_codes read_codes(const char *first, const char *second)
{
    two_codes codes;
    const __m128i a = _mm_loadl_epi64((const __m128i *)first), b = _mm_loadl_epi64((const __m128i *)second);
    _mm_storeu_si128((__m128i *)codes.pairs, _mm_unpacklo_epi8(a, b));
    return codes;
}

/* A shuffle within lanes reads the lowest two bits of each index. */
static ALWAYS_INLINE __m256i index_in_groups(const two_codes *codes, int step)
{
    const int upper = step % 2 ? 16 : 0; /* two steps read one number, which is stored whole */
    int32_t pairs;
    memcpy(&pairs, codes->pairs + 4 * (step / 2), sizeof pairs);
    return _mm256_srlv_epi32(_mm256_set1_epi32(pairs),
                             _mm256_setr_epi32(upper, upper + 2, upper + 8, upper + 10, upper + 4, upper + 6, upper + 12,
                                               upper + 14));
}

/* Two groups of the first row and the second, of four that are read. */
static ALWAYS_INLINE __m256 alternate(__m256 first, __m256 second, int half)
{
    const __m256d a = _mm256_castps_pd(first), b = _mm256_castps_pd(second);
    const __m256d even = _mm256_unpacklo_pd(a, b), odd = _mm256_unpackhi_pd(a, b);
    return _mm256_castpd_ps(half ? _mm256_permute2f128_pd(even, odd, 0x31) : _mm256_permute2f128_pd(even, odd, 0x20));
}

#define TWO_ROWS_FROM 1
#define CODES two_codes
#define TWO_CODES(first, second) read_codes(first, second)
#define INDEX __m256i
#define INDEX_IN_GROUPS(codes, step) index_in_groups(&(codes), step)
#define PICK_IN_GROUPS(channels, index) _mm256_permutevar_ps(channels, index)
#define ALTERNATE(first, second, half) alternate(first, second, half)
#define TOTAL_OF_ROW(sum, row) total_of_row(sum, row)

#define STAGED float
#define LANES 8
#define VECTOR __m256
#define SUM __m256
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define EXPAND(p, bits) expand(KEPT(p), bits, ZERO())
#define ZERO() _mm256_setzero_ps()
#define FMA(sum, w, x) _mm256_fmadd_ps(w, x, sum)
#define TOTAL(sum) total_8(sum)

#define KIND f32
#define WEIGHT float
#define KEPT(p) _mm256_loadu_ps(p)
#include "product/family.h"

#define KIND bf16
#define WEIGHT uint16_t
#define KEPT(p) widen_bf16(p)
#include "product/family.h"

#define KIND f16
#define WEIGHT uint16_t
#define KEPT(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#include "product/family.h"

#define WIDEN_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define SPREAD(p) _mm256_broadcast_ss(p)
#define TURN_8(from, apart, to, to_apart) turn_8(from, apart, to, to_apart)
#include "product/many.h"

#undef VECTOR
#undef LOAD

typedef struct {
    __m256i half[2];
} block_i8;

static ALWAYS_INLINE block_i8 load_i8(const int8_t *p)
{
    return (block_i8){{_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))}};
}

static ALWAYS_INLINE block_i8 expand_i8(const int8_t *p, uint64_t bits)
{
    int8_t block[BLOCK] __attribute__((aligned(32)));
    for (int channel = 0; channel < BLOCK; channel += 8) {
        __m128i kept = _mm_loadl_epi64((const __m128i *)(p + __builtin_popcountll(before(bits, channel))));
        __m128i index = _mm_loadl_epi64((const __m128i *)expand_bytes[bits >> channel & 255]);
        _mm_storel_epi64((__m128i *)(block + channel), _mm_shuffle_epi8(kept, index));
    }
    return load_i8(block);
}

/* |w| x sign(w): two products of at most 127 x 128 fit into 16 bits. */
static ALWAYS_INLINE __m256i dot_half(__m256i w, __m256i x)
{
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}

static ALWAYS_INLINE __m256i dot_i8(block_i8 w, block_i8 x)
{
    return _mm256_add_epi32(dot_half(w.half[0], x.half[0]), dot_half(w.half[1], x.half[1]));
}

/* The scales of I4 for vectors of two parts, each a lane of 128 bits. */
typedef struct {
    __m256 half[2];
} scales_i4;

/* The scales of a block of I4 of two rows, as lanes of 32 bits in turns of two, moved left by so many bits. */
static ALWAYS_INLINE scales_i4 scales_in_lanes(const char *first, const char *second, __m256i left, __m256i other_left)
{
    const __m256i own = _mm256_set1_epi32(7 << 20), least = _mm256_set1_epi32(LEAST_POWER);
    const __m256i both = _mm256_blend_epi32(_mm256_set1_epi32((int32_t)read_scales(first)),
                                            _mm256_set1_epi32((int32_t)read_scales(second)), 0xcc);
    const __m256i power = _mm256_add_epi32(least, _mm256_slli_epi32(_mm256_srli_epi32(both, 12), 23));
    const __m256i one = _mm256_and_si256(_mm256_sllv_epi32(both, left), own);
    const __m256i two = _mm256_and_si256(_mm256_sllv_epi32(both, other_left), own);
    return (scales_i4){{_mm256_castsi256_ps(_mm256_or_si256(power, one)),
                        _mm256_castsi256_ps(_mm256_or_si256(power, two))}};
}

/* Those of the four parts of one row. */
static ALWAYS_INLINE scales_i4 scales_of_halves(const char *block)
{
    return scales_in_lanes(block, block, _mm256_setr_epi32(20, 20, 20, 20, 17, 17, 17, 17),
                           _mm256_setr_epi32(14, 14, 14, 14, 11, 11, 11, 11));
}

static ALWAYS_INLINE __m256 add_scaled(__m256 sum, __m256i count, __m256 w_scale, float x_scale)
{
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(count), _mm256_set1_ps(x_scale)), w_scale, sum);
}

static ALWAYS_INLINE __m256 add_parts(__m256 sum, block_i8 w, block_i8 x, scales_i4 w_scale, float x_scale)
{
    sum = add_scaled(sum, dot_half(w.half[0], x.half[0]), w_scale.half[0], x_scale);
    return add_scaled(sum, dot_half(w.half[1], x.half[1]), w_scale.half[1], x_scale);
}

/* ---- integers, two rows that keep half: in each lane of 128 bits, four groups of both ---- */

typedef struct {
    __m256i w[2], index[2]; /* of the first and third, and of the second and fourth 16 channels */
    scales_i4 scale;        /* of I8 the first is that of all */
} two_blocks;

/* Of each kept value, its channel in its four groups. */
static ALWAYS_INLINE __m256i places_in_lanes(const char *block)
{
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)block));
    code = _mm256_or_si256(code, _mm256_slli_epi32(code, 12));
    code = _mm256_and_si256(_mm256_or_si256(code, _mm256_slli_epi32(code, 6)), _mm256_set1_epi8(3));
    return _mm256_or_si256(code, _mm256_set1_epi64x(0x0c0c080804040000));
}

/* Of the kept values of I4 with these places, twice the integers, and one more where the first place is the larger one. */
static ALWAYS_INLINE __m256i read_nibbles(const char *block, __m256i places)
{
    const __m256i turn = _mm256_set_epi64x(0x0e0f0c0d0a0b0809, 0x0607040502030001, 0x0e0f0c0d0a0b0809, 0x0607040502030001);
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(block + HEADER_I4)));
    const __m256i apart = _mm256_or_si256(_mm256_slli_epi16(wide, 1), _mm256_slli_epi16(wide, 5));
    const __m256i twice = _mm256_sub_epi8(_mm256_and_si256(apart, _mm256_set1_epi8(30)), _mm256_set1_epi8(16));
    return _mm256_sub_epi8(twice, _mm256_cmpgt_epi16(_mm256_shuffle_epi8(places, turn), places));
}

static ALWAYS_INLINE __m256i read_kept(const char *block, int32_t number, __m256i places)
{
    return number == I4 ? read_nibbles(block, places) : _mm256_loadu_si256((const __m256i *)(block + HEADER_I8));
}

static ALWAYS_INLINE two_blocks read_two(const char *first, const char *second, int32_t number)
{
    const __m256i c = places_in_lanes(first), d = places_in_lanes(second);
    const __m256i a = read_kept(first, number, c), b = read_kept(second, number, d);
    two_blocks two = {
        .w = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)},
        .index = {_mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d)},
    };
    if (number == I4)
        two.scale = scales_in_lanes(first, second, _mm256_setr_epi32(20, 20, 20, 20, 14, 14, 14, 14),
                                    _mm256_setr_epi32(17, 17, 17, 17, 11, 11, 11, 11));
    else
        two.scale.half[0] = _mm256_blend_ps(_mm256_set1_ps(read_scale(first, I8, 0)),
                                            _mm256_set1_ps(read_scale(second, I8, 0)), 0xcc);
    return two;
}

static ALWAYS_INLINE __m256 add_two(__m256 sum, const two_blocks *two, const __m256i *x, float x_scale, int32_t number)
{
    __m256i dot[2];
    UNROLLED for (int i = 0; i < 2; i++)
        dot[i] = dot_half(two->w[i], _mm256_shuffle_epi8(x[i], two->index[i]));
    if (number == I8)
        return add_scaled(sum, _mm256_add_epi32(dot[0], dot[1]), two->scale.half[0], x_scale);
    return add_scaled(add_scaled(sum, dot[0], two->scale.half[0], x_scale), dot[1], two->scale.half[1], x_scale);
}

static ALWAYS_INLINE void add_two_integers(__m256 sums[][WIDE_BATCH], const two_blocks *two, const struct product *job,
                                           int32_t number, int64_t pair, int64_t n, const int batch)
{
    UNROLLED for (int b = 0; b < batch; b++) {
        const int64_t place = wide_place(pair, job->weights->count, n, b, batch);
        const block_i8 x = load_i8((const int8_t *)job->staged->values + place * BLOCK);
        const __m256i lanes[2] = {_mm256_permute2x128_si256(x.half[0], x.half[1], 0x20),
                                  _mm256_permute2x128_si256(x.half[0], x.half[1], 0x31)};
        UNROLLED for (int p = 0; p < PAIRS; p++)
            sums[p][b] = add_two(sums[p][b], &two[p], lanes, job->staged->scale[place], number);
    }
}

#define TWO two_blocks
#define NAME two_rows_i8
#define READ_TWO(first, second) read_two(first, second, I8)
#define ADD_TWO(sums, two, block, job, pair, n, batch) add_two_integers(sums, two, job, I8, pair, n, batch)
#include "product/two_rows.h"
#define TWO_ROWS_I8 1
#define TWO two_blocks
#define NAME two_rows_i4
#define READ_TWO(first, second) read_two(first, second, I4)
#define ADD_TWO(sums, two, block, job, pair, n, batch) add_two_integers(sums, two, job, I4, pair, n, batch)
#include "product/two_rows.h"
#define TWO_ROWS_I4 1

#define VECTOR block_i8
#define LOAD(p) load_i8(p)
#define EXPAND_BLOCK(p, bits) expand_i8(p, bits)
#define DOT(w, x) dot_i8(w, x)
#define SCALE(sum, count, w_scale, x_scale) add_scaled(sum, count, _mm256_set1_ps(w_scale), x_scale)
#define SCALES scales_i4
#define READ_SCALES(block) scales_of_halves(block)
#define ADD_PARTS(sum, w, x, w_scale, x_scale) add_parts(sum, w, x, w_scale, x_scale)
#include "product/family_i8.h"
