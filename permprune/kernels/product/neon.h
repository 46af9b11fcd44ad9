/* Products with NEON. */
/* For four bits of a mask, the index of the byte of the kept values for each byte of four channels; 255 means none. */
static uint8_t expand_lanes[16][16];

__attribute__((constructor)) static void fill_expand_lanes(void)
{
    for (int bits = 0; bits < 16; bits++)
        for (int channel = 0, value = 0; channel < 4; channel++) {
            int kept = bits >> channel & 1;
            for (int byte = 0; byte < 4; byte++)
                expand_lanes[bits][4 * channel + byte] = (uint8_t)(kept ? 4 * value + byte : 255);
            value += kept;
        }
}

static ALWAYS_INLINE float32x4_t expand(float32x4_t kept, uint64_t bits)
{
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(kept), vld1q_u8(expand_lanes[bits & 15])));
}

#define STAGED float
#define LANES 4
#define VECTOR float32x4_t
#define SUM float32x4_t
#define LOAD(p) vld1q_f32(p)
#define STORE(p, v) vst1q_f32(p, v)
#define EXPAND(p, bits) expand(KEPT(p), bits)
#define ZERO() vdupq_n_f32(0)
#define FMA(sum, w, x) vfmaq_f32(sum, w, x)
#define TOTAL(sum) vaddvq_f32(sum)

#define KIND f32
#define WEIGHT float
#define KEPT(p) vld1q_f32(p)
#include "product/family.h"

#define KIND bf16
#define WEIGHT uint16_t
#define KEPT(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#include "product/family.h"

#define KIND f16
#define WEIGHT uint16_t
#define KEPT(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#include "product/family.h"

#define WIDEN_F16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define SPREAD(p) vld1q_dup_f32(p)
#include "product/many.h"

#undef VECTOR
#undef LOAD

typedef struct {
    int8x8_t part[8];
} block_i8;

static ALWAYS_INLINE block_i8 load_i8(const int8_t *p)
{
    block_i8 block;
    for (int i = 0; i < 8; i++)
        block.part[i] = vld1_s8(p + 8 * i);
    return block;
}

static ALWAYS_INLINE block_i8 expand_i8(const int8_t *p, uint64_t bits)
{
    block_i8 block;
    for (int i = 0; i < 8; i++)
        block.part[i] = vtbl1_s8(vld1_s8(p + __builtin_popcountll(before(bits, 8 * i))),
                                vreinterpret_s8_u8(vld1_u8(expand_bytes[bits >> 8 * i & 255])));
    return block;
}

/* The products of parts of 8 channels. */
static ALWAYS_INLINE int32x4_t dot_parts(block_i8 w, block_i8 x, int first, int last)
{
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = first; i < last; i++)
        sum = vpadalq_s16(sum, vmull_s8(w.part[i], x.part[i]));
    return sum;
}

static ALWAYS_INLINE float32x4_t add_parts(float32x4_t sum, block_i8 w, block_i8 x, const char *block, float x_scale)
{
    for (int part = 0; part < BLOCK; part += PART) {
        float32x4_t count = vcvtq_f32_s32(dot_parts(w, x, part / 8, (part + PART) / 8));
        sum = vfmaq_n_f32(sum, vmulq_n_f32(count, x_scale), read_scale(block, I4, part));
    }
    return sum;
}

#define VECTOR block_i8
#define LOAD(p) load_i8(p)
#define EXPAND_BLOCK(p, bits) expand_i8(p, bits)
#define DOT(w, x) dot_parts(w, x, 0, 8)
#define SCALE(sum, count, w_scale, x_scale) vfmaq_n_f32(sum, vmulq_n_f32(vcvtq_f32_s32(count), x_scale), w_scale)
#define SCALES const char *
#define READ_SCALES(block) (block)
#define ADD_PARTS(sum, w, x, w_scale, x_scale) add_parts(sum, w, x, w_scale, x_scale)
#include "product/family_i8.h"
