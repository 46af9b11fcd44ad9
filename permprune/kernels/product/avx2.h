/* Products with AVX2. */

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

static ALWAYS_INLINE float total(__m256 sum)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "product/turn_8.h"

#define STAGED float
#define LANES 8
#define VECTOR __m256
#define SUM __m256
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define EXPAND(p, bits) expand(KEPT(p), bits, ZERO())
#define ZERO() _mm256_setzero_ps()
#define FMA(sum, w, x) _mm256_fmadd_ps(w, x, sum)
#define TOTAL(sum) total(sum)

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
static ALWAYS_INLINE __m256i dot_i8(block_i8 w, block_i8 x)
{
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 2; i++) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.half[i]), _mm256_sign_epi8(x.half[i], w.half[i]));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
}

#define VECTOR block_i8
#define LOAD(p) load_i8(p)
#define EXPAND_BLOCK(p, bits) expand_i8(p, bits)
#define DOT(shift, w, x) dot_i8(w, x)
#define SCALE(sum, count, w_scale, x_scale)                                                                            \
    _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(count), _mm256_set1_ps(x_scale)), _mm256_set1_ps(w_scale), sum)
#include "product/family_i8.h"
