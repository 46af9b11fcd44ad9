/* Products with AVX-512. */
#include "product/avx512_codes.h"
#include "product/vectors_256.h"

static ALWAYS_INLINE __m256i load_16(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

static ALWAYS_INLINE __m256i half_of(__m512i v, int upper)
{
    return upper ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
}

static ALWAYS_INLINE __m512 widen_bf16(__m256i v)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

/* The channels of lanes 16 step to 16 step + 15 of the kept ones, among the 32 channels from 32 step on: the positions in
 * their groups of four, to which each pair of lanes adds the first channel of its group. Only the lowest five bits
 * count. */
static ALWAYS_INLINE __m512i positions(uint64_t code, int step)
{
    const __m512i fields = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512i shifted = _mm512_multishift_epi64_epi8(fields, _mm512_set1_epi64((int64_t)(code >> 32 * step)));
    return add_groups(shifted, _mm512_set1_epi32(3), groups);
}

static ALWAYS_INLINE __m512i masked(__m512i channels, int step)
{
    return _mm512_cvtepu8_epi32(step ? _mm512_extracti32x4_epi32(channels, 1) : _mm512_castsi512_si128(channels));
}

/* What two rows keep of the groups of 16 channels: in each lane of 128 bits, a group, two positions of the first row and
 * two of the second, of which only the lowest two bits count. */
static ALWAYS_INLINE __m512i index_in_groups(__m512i codes, int step)
{
    const __m512i fields = _mm512_setr_epi32(0, 2, 0, 2, 4, 6, 4, 6, 8, 10, 8, 10, 12, 14, 12, 14);
    return _mm512_multishift_epi64_epi8(_mm512_add_epi32(fields, _mm512_set1_epi32(16 * step)), codes);
}

static ALWAYS_INLINE __m512 alternate_floats(__m512 first, __m512 second, int upper)
{
    return _mm512_castsi512_ps(alternate(_mm512_castps_si512(first), _mm512_castps_si512(second), upper));
}

static void unpack_16(const struct product *job, int64_t first, int64_t last)
{
    const struct weights *weights = job->weights;
    const int64_t size = block_bytes(weights);
    const char *block = weights->blocks + first * weights->count * size;
    const char *end = weights->blocks + weights->rows * weights->count * size;
    uint16_t room[BLOCK];
    for (int64_t row = first; row < last; row++)
        for (int64_t n = 0; n < weights->count; n++, block += size) {
            const uint64_t bits = kept_channels(read_code(block), weights->kind);
            const uint16_t *values = readable(block + CODE, end, room, sizeof room);
            uint16_t *to = (uint16_t *)job->output + row * weights->width + n * BLOCK;
            const int64_t left = weights->width - n * BLOCK;
            UNROLLED for (int step = 0; step < BLOCK; step += 32) {
                __m512i next = _mm512_loadu_si512(values + __builtin_popcountll(before(bits, step)));
                __m512i whole = _mm512_maskz_expand_epi16((__mmask32)(bits >> step), next);
                uint64_t inside = left - step >= 32 ? UINT32_MAX : left > step ? (1ull << (left - step)) - 1 : 0;
                _mm512_mask_storeu_epi16(to + step, (__mmask32)inside, whole);
            }
        }
}
#define UNPACK_16 unpack_16

#define STAGED float
#define LANES 16
#define VECTOR __m512
#define SUM __m512
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define EXPAND(p, bits) _mm512_maskz_expand_ps((__mmask16)(bits), KEPT(p))
#define ZERO() _mm512_setzero_ps()
#define FMA(sum, w, x) _mm512_fmadd_ps(w, x, sum)
#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define INDEX __m512i
#define PICK(low, index, high) _mm512_permutex2var_ps(low, index, high)
#define MASK_PLACES __m512i
#define DECODE_MASK(code) channels_of(code)
#define AT_MASK(places, step) masked(places, step)
#define POSITIONS_PLACES uint64_t
#define DECODE_POSITIONS(code) (code)
#define AT_POSITIONS(places, step) positions(places, step)
#define CODES __m512i
#define TWO_CODES(first, second) two_codes(first, second)
#define INDEX_IN_GROUPS(codes, step) index_in_groups(codes, step)
#define PICK_IN_GROUPS(channels, index) _mm512_permutevar_ps(channels, index)
#define ALTERNATE(first, second, half) alternate_floats(first, second, half)
#define TOTAL_OF_ROW(sum, row) total_of_row(sum, row)

#define KIND f32
#define WEIGHT float
#define KEPT(p) _mm512_loadu_ps(p)
#define HALF const float *
#define READ_HALF(p) (p)
#define PART(half, step) KEPT((half) + (step) * LANES)
#include "product/family.h"

#define KIND bf16
#define WEIGHT uint16_t
#define KEPT(p) widen_bf16(load_16(p))
#define HALF __m512i
#define READ_HALF(p) _mm512_loadu_si512(p)
#define PART(half, step) widen_bf16(half_of(half, step))
#include "product/family.h"

#define KIND f16
#define WEIGHT uint16_t
#define KEPT(p) _mm512_cvtph_ps(load_16(p))
#define HALF __m512i
#define READ_HALF(p) _mm512_loadu_si512(p)
#define PART(half, step) _mm512_cvtph_ps(half_of(half, step))
#include "product/family.h"

#define WIDEN_F16(p) _mm512_cvtph_ps(load_16(p))
#define SPREAD(p) _mm512_set1_ps(*(p))
#define TURN_8(from, apart, to, to_apart) turn_8(from, apart, to, to_apart)
#include "product/many.h"

#undef VECTOR
#undef LOAD
#undef SUM
#undef ZERO
#undef SCALE
#undef TOTAL

/* ---- integers, half of them kept, by the 32 channels that are picked: of eight bits unsigned |w| by signed x sign(w) ---- */

typedef struct {
    __m256i w, index; /* index of the channel of each byte of w */
} half_block;

/* The channel of each kept value of a block. */
static ALWAYS_INLINE __m256i index_of_half(const char *block)
{
    const __m256i fields = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40,
                                            42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
    const __m256i groups = _mm256_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28, 32, 32, 36, 36, 40,
                                            40, 44, 44, 48, 48, 52, 52, 56, 56, 60, 60);
    __m256i shifted = _mm256_multishift_epi64_epi8(fields, _mm256_set1_epi64x((int64_t)read_code(block)));
    return _mm256_ternarylogic_epi64(groups, shifted, _mm256_set1_epi8(3), OR_AND);
}

static ALWAYS_INLINE half_block read_half_i8(const char *block)
{
    return (half_block){_mm256_loadu_si256((const __m256i *)(block + HEADER_I8)), index_of_half(block)};
}

static ALWAYS_INLINE __m256i pick_half(half_block half, __m512i x)
{
    return _mm256_permutex2var_epi8(half_of(x, 0), half.index, half_of(x, 1));
}

static ALWAYS_INLINE __m256i dot_half_i8(half_block half, __m512i x)
{
    __m256i picked = pick_half(half, x);
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(half.w), _mm256_sign_epi8(picked, half.w));
}

#define VECTOR __m512i
#define LOAD(p) _mm512_loadu_si512(p)

#define SUM __m256
#define ZERO() _mm256_setzero_ps()
#define TOTAL(sum) total_8(sum)
#define NAME half_i8
#define SCALE_OF(weights, block, place) read_scale(block, I8, 0)
#define SCALE(sum, count, w_scale, x_scale)                                                                            \
    _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(count), _mm256_set1_ps(x_scale)), _mm256_set1_ps(w_scale), sum)
#define FACTORS half_block
#define READ(weights, block, end, room) ((void)(end), (void)(room), read_half_i8(block))
#define DOT(w, x) dot_half_i8(w, x)
#include "product/product_i8.h"
#define HALF_I8

#undef SUM
#undef ZERO
#undef DOT
#undef SCALE
#undef TOTAL

/* ---- integers, two rows that keep half: the activations, plus 128, are unsigned, and `shift` makes up for that ---- */

typedef struct {
    __m512i w, index;
    __m512i shift; /* -128 times the sum of each four of w */
    __m512 scale;
} two_blocks;

/* The upper half is undefined. Clang's own cast copies something there. */
static ALWAYS_INLINE __m512i as_lower_half(__m256i v)
{
#if defined(__clang__)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, -1, -1, -1, -1);
#else
    return _mm512_castsi256_si512(v);
#endif
}

/* The scales of a block of I4 of two rows: each lane of 128 bits is a part. */
static ALWAYS_INLINE __m512 scales_in_lanes(const char *first, const char *second)
{
    const __m512i left = _mm512_setr_epi32(20, 20, 20, 20, 17, 17, 17, 17, 14, 14, 14, 14, 11, 11, 11, 11);
    const __m512i power = _mm512_set1_epi32(15 << 23), own = _mm512_set1_epi32(15 << 23 | 7 << 20);
    const __mmask32 other = 0xf0f0f0f0; /* SECOND_ROW, in lanes of 16 bits */
    const __m512i both = _mm512_mask_set1_epi16(_mm512_set1_epi16((int16_t)read_scales(first)), other,
                                                (int16_t)read_scales(second));
    /* the upper 16 bits of a lane are the same again, so that the exponent is there, too */
    const __m512i bits = _mm512_ternarylogic_epi32(power, _mm512_srli_epi32(both, 5), _mm512_sllv_epi32(both, left), SELECT);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(bits, own), _mm512_set1_epi32(LEAST_POWER)));
}

/* The channels of the kept values of two rows: in each lane of 128 bits, four groups of both. */
static ALWAYS_INLINE __m512i index_of_two(const char *first, const char *second)
{
#define FIELDS(bit) bit, bit + 2, bit + 4, bit + 6, bit + 8, bit + 10, bit + 12, bit + 14
    static const uint8_t fields[64] __attribute__((aligned(64))) = {FIELDS(0),  FIELDS(0),  FIELDS(16), FIELDS(16),
                                                                    FIELDS(32), FIELDS(32), FIELDS(48), FIELDS(48)};
#undef FIELDS
    const __m512i groups = _mm512_set4_epi32(0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000);
    __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(fields), two_codes(first, second));
    return add_groups(shifted, _mm512_set1_epi8(3), groups);
}

/* In each lane of 128 bits, four groups: eight channels of the first row and eight of the second. */
static ALWAYS_INLINE two_blocks two_blocks_of(__m512i w, __m512i index, __m512 scale)
{
    const __m512i inverted = _mm512_xor_si512(w, _mm512_set1_epi8(-1));
    /* 128 x (-w - 1), plus 128, of four each */
    const __m512i shift = _mm512_dpbusd_epi32(_mm512_set1_epi32(4 * 128), _mm512_set1_epi8(-128), inverted);
    return (two_blocks){w, index, shift, scale};
}

static ALWAYS_INLINE two_blocks read_two_i8(const char *first, const char *second)
{
    const __m256i one = _mm256_loadu_si256((const __m256i *)(first + HEADER_I8));
    const __m256i other = _mm256_loadu_si256((const __m256i *)(second + HEADER_I8));
    const __m512 scale = _mm512_mask_blend_ps(SECOND_ROW, _mm512_set1_ps(read_scale(first, I8, 0)),
                                              _mm512_set1_ps(read_scale(second, I8, 0)));
    return two_blocks_of(alternate(as_lower_half(one), as_lower_half(other), 0), index_of_two(first, second), scale);
}

/* Two blocks of I4: twice the integers as they are stored, plus 8, and one more in groups whose first position is behind
 * the second. */
typedef struct {
    __m512i w, index;
    __m512 scale;
} two_blocks_i4;

static ALWAYS_INLINE two_blocks_i4 read_two_i4(const char *first, const char *second)
{
    const __m512i turn = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);
    const __m256i apart = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i index = index_of_two(first, second);
    const __m256i one = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(first + HEADER_I4)));
    const __m256i both = _mm256_inserti128_si256(one, _mm_loadu_si128((const __m128i *)(second + HEADER_I4)), 1);
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(both, apart));
    const __m512i even = _mm512_ternarylogic_epi64(_mm512_slli_epi16(wide, 1), _mm512_slli_epi16(wide, 5),
                                                   _mm512_set1_epi8(30), AND_OF_OR);
    const __mmask32 turned = _mm512_cmpgt_epi16_mask(_mm512_shuffle_epi8(index, turn), index);
    const __m512i w = _mm512_mask_add_epi16(even, turned, even, _mm512_set1_epi8(1));
    return (two_blocks_i4){w, index, scales_in_lanes(first, second)};
}

/* The products in floats: added to the bits of 1.5 x 2^23, a sum makes them those of 1.5 x 2^23 plus the sum. */
static ALWAYS_INLINE __m512 add_dot_i4(__m512 sum, two_blocks_i4 two, __m512i x, float scale)
{
    const __m512i start = _mm512_set1_epi32(0x4b400000);
    const __m512i picked = _mm512_shuffle_epi8(x, two.index);
    const __m512i shifted = _mm512_dpbusd_epi32(start, two.w, picked);
    const __m512i shift = _mm512_dpbusd_epi32(start, _mm512_set1_epi8(16), picked);
    const __m512 product = _mm512_sub_ps(_mm512_castsi512_ps(shifted), _mm512_castsi512_ps(shift));
    return _mm512_fmadd_ps(_mm512_mul_ps(product, _mm512_set1_ps(scale)), two.scale, sum);
}

static ALWAYS_INLINE __m512 add_dot(__m512 sum, two_blocks two, __m512i x, float scale)
{
    __m512i picked = _mm512_shuffle_epi8(_mm512_xor_si512(x, _mm512_set1_epi8(-128)), two.index);
    __m512 product = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(two.shift, picked, two.w));
    return _mm512_fmadd_ps(_mm512_mul_ps(product, _mm512_set1_ps(scale)), two.scale, sum);
}

#define SUM __m512
#define ZERO() _mm512_setzero_ps()

#define ADD_TWO_INTEGERS(NAME, BLOCKS, ADD_DOT)                                                                        \
    static ALWAYS_INLINE void NAME(SUM sums[][WIDE_BATCH], const BLOCKS *two, const char *const *block,                \
                                   const struct product *job, int64_t pair, int64_t n, const int batch)                \
    {                                                                                                                  \
        (void)block;                                                                                                   \
        UNROLLED for (int b = 0; b < batch; b++) {                                                                     \
            const int64_t place = wide_place(pair, job->weights->count, n, b, batch);                                  \
            const __m512i channels = _mm512_loadu_si512((const int8_t *)job->staged->values + place * BLOCK);          \
            UNROLLED for (int p = 0; p < PAIRS; p++)                                                                   \
                sums[p][b] = ADD_DOT(sums[p][b], two[p], channels, job->staged->scale[place]);                         \
        }                                                                                                              \
    }
ADD_TWO_INTEGERS(add_two_i8, two_blocks, add_dot)
ADD_TWO_INTEGERS(add_two_i4, two_blocks_i4, add_dot_i4)

#define NAME two_rows_i8
#define TWO two_blocks
#define READ_TWO(first, second) read_two_i8(first, second)
#define ADD_TWO add_two_i8
#include "product/two_rows.h"
#define TWO_ROWS_I8 2
#define NAME two_rows_i4
#define TWO two_blocks_i4
#define READ_TWO(first, second) read_two_i4(first, second)
#define ADD_TWO add_two_i4
#include "product/two_rows.h"
#define TWO_ROWS_I4 1

/* ---- integers, any pattern ---- */

#define TOTAL(sum) _mm512_reduce_add_ps(sum)
#define EXPAND_BLOCK(p, bits) _mm512_maskz_expand_epi8(bits, LOAD(p))

/* Unsigned |w| is multiplied by signed x sign(w), so that no lane is larger than its part of the product. */
typedef struct {
    __m512i magnitude;
    __mmask64 negative;
} signed_block;

static ALWAYS_INLINE signed_block read_signed(__m512i w)
{
    return (signed_block){_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}

static ALWAYS_INLINE __m512i dot_signed(signed_block w, __m512i x)
{
    const __m512i zero = _mm512_setzero_si512();
    return _mm512_dpbusd_epi32(zero, w.magnitude, _mm512_mask_sub_epi8(x, w.negative, zero, x));
}

#define FACTOR_TYPE signed_block
#define FACTOR(w) read_signed(w)
#define DOT(w, x) dot_signed(w, x)
#define SCALE(sum, count, w_scale, x_scale)                                                                            \
    _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(count), _mm512_set1_ps(x_scale)), _mm512_set1_ps(w_scale), sum)
#define SCALES __m512
#define READ_SCALES(block) scales_in_lanes(block, block)
#define ADD_PARTS(sum, w, x, w_scale, x_scale)                                                                         \
    _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(DOT(w, x)), _mm512_set1_ps(x_scale)), w_scale, sum)
#include "product/family_i8.h"
