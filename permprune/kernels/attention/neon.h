/* Attention with NEON, after product/neon.h. */
static ALWAYS_INLINE float32x4_t read_quarter(const char *from, const int number)
{
    switch (number) {
    case F32: return vld1q_f32((const float *)from);
    case BF16: return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)from), 16));
    case F16: return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)from)));
    default: return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8((const int8_t *)from)))));
    }
}

static ALWAYS_INLINE lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
{
    uint8x16_t quarter[4];
    memcpy(quarter, &rest, sizeof quarter);
    UNROLLED for (int i = 0; i < 4; i++, bits >>= 4) {
        uint8x16_t kept = vreinterpretq_u8_f32(read_quarter(from, number));
        quarter[i] = vqtbx1q_u8(quarter[i], kept, vld1q_u8(expand_lanes[bits & 15]));
        from += __builtin_popcount(bits & 15) * value_bytes(1, number);
    }
    memcpy(&rest, quarter, sizeof quarter);
    return rest;
}

static ALWAYS_INLINE bytes look_up(const int8_t *table, bytes places)
{
    return (bytes)vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(table)), (uint8x16_t)places);
}

#include "attention/kernels.h"
