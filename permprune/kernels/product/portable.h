/* Products in plain C, with vectors of four floats. */
typedef float vector __attribute__((vector_size(16)));

/* Moves successive values to the positions of the ones in four bits, with zeros between. */
static ALWAYS_INLINE vector expand(vector kept, uint64_t bits)
{
    const float values[5] = {kept[0], kept[1], kept[2], kept[3], 0};
    vector four;
    for (int channel = 0, value = 0; channel < 4; channel++) {
        int is_kept = bits >> channel & 1;
        four[channel] = values[is_kept ? value : 4];
        value += is_kept;
    }
    return four;
}

static ALWAYS_INLINE vector load(const float *p) { return (vector){p[0], p[1], p[2], p[3]}; }

static ALWAYS_INLINE void store(float *p, vector v) { memcpy(p, &v, sizeof v); }

static ALWAYS_INLINE vector load_bf16(const uint16_t *p)
{
    return (vector){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}

static ALWAYS_INLINE vector load_f16(const uint16_t *p)
{
    return (vector){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}

#define STAGED float
#define LANES 4
#define VECTOR vector
#define SUM vector
#define LOAD(p) load(p)
#define STORE(p, v) store(p, v)
#define EXPAND(p, bits) expand(KEPT(p), bits)
#define ZERO() ((vector){0})
#define FMA(sum, w, x) ((sum) + (w) * (x))
#define TOTAL(sum) (((sum)[0] + (sum)[1]) + ((sum)[2] + (sum)[3]))

#define KIND f32
#define WEIGHT float
#define KEPT(p) load(p)
#include "product/family.h"

#define KIND bf16
#define WEIGHT uint16_t
#define KEPT(p) load_bf16(p)
#include "product/family.h"

#define KIND f16
#define WEIGHT uint16_t
#define KEPT(p) load_f16(p)
#include "product/family.h"

#define WIDEN_F16(p) load_f16(p)
#define MOST 2 /* it is not for speed */
#define SPREAD(p) ((vector){*(p), *(p), *(p), *(p)})
#include "product/many.h"

#undef VECTOR
#undef SUM
#undef LOAD
#undef ZERO
#undef TOTAL

typedef struct {
    int8_t channel[BLOCK];
} block_i8;

static ALWAYS_INLINE block_i8 load_i8(const int8_t *p)
{
    block_i8 block;
    memcpy(&block, p, sizeof block);
    return block;
}

static ALWAYS_INLINE block_i8 expand_i8(const int8_t *p, uint64_t bits)
{
    block_i8 block;
    for (int channel = 0; channel < BLOCK; channel++, bits >>= 1) {
        block.channel[channel] = (int8_t)(*p & -(int)(bits & 1));
        p += bits & 1;
    }
    return block;
}

static ALWAYS_INLINE int32_t dot_i8(const block_i8 *w, const block_i8 *x, int first, int last)
{
    int32_t sum = 0;
    for (int channel = first; channel < last; channel++)
        sum += w->channel[channel] * x->channel[channel];
    return sum;
}

static ALWAYS_INLINE float add_parts(float sum, const block_i8 *w, const block_i8 *x, const char *block, float x_scale)
{
    for (int part = 0; part < BLOCK; part += PART)
        sum += (float)dot_i8(w, x, part, part + PART) * x_scale * read_scale(block, I4, part);
    return sum;
}

#define VECTOR block_i8
#define SUM float
#define LOAD(p) load_i8(p)
#define EXPAND_BLOCK(p, bits) expand_i8(p, bits)
#define DOT(w, x) dot_i8(&(w), &(x), 0, BLOCK)
#define ZERO() 0
#define SCALE(sum, count, w_scale, x_scale) ((sum) + (float)(count) * (x_scale) * (w_scale))
#define TOTAL(sum) (sum)
#define SCALES const char *
#define READ_SCALES(block) (block)
#define ADD_PARTS(sum, w, x, w_scale, x_scale) add_parts(sum, &(w), &(x), w_scale, x_scale)
#include "product/family_i8.h"
