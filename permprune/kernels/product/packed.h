/* Packed N:M weights, and products with activations: the definitions that all kernels share.
 *
 * A weight of `rows` x `width` keeps n of every m consecutive weights of a row. A row is a sequence of blocks of BLOCK
 * channels, so that a product reads memory from front to back. A block is
 *
 *     code     8 bytes that say which channels are kept
 *     scale    fp32, of I8 only: the value of one integer step
 *     values   `slots` numbers: the kept weights in channel order, then zeros
 *
 * A code of kind MASK has a bit for every channel; the bits after the width are zero. One of kind POSITIONS, for 2:4, has
 * four bits for each group of four channels: the position of the first kept channel in bits 0 and 1, that of the second
 * in bits 2 and 3. After the width the positions are 0 and 1, and the values zeros. No code can refer to a channel
 * outside its block; a kernel never reads outside the blocks, whatever the codes are.
 *
 * PLAIN weights, for tables of int8 and for comparison, have no codes, all values, and their scales elsewhere.
 */
#ifndef PERMPRUNE_PACKED_H
#define PERMPRUNE_PACKED_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
/* The functions between BEGIN_TARGET and END_TARGET use instructions that not every processor has. */
#define STRING_(...) #__VA_ARGS__
#define PRAGMA(...) _Pragma(STRING_(__VA_ARGS__))
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
/* Before a loop with a constant count: sums in an array stay in registers only if the loop is unrolled early. */
#if defined(__clang__)
#define UNROLLED PRAGMA(clang loop unroll(full))
#else
#define UNROLLED PRAGMA(GCC unroll 16)
#endif

enum { BLOCK = 64 };     /* channels of a block */
enum { CODE = 8 };       /* bytes of a code */
enum { HEADER_I8 = 12 }; /* bytes of a code and a scale */
enum { TILE_ROWS = 4 };  /* rows of the weight that a tile multiplies at once */
enum { TILE_BATCH = 4 }; /* rows of the activations that a tile multiplies at once */

enum number { F32, BF16, F16, I8, NUMBERS };
enum kind { MASK, POSITIONS, PLAIN };

/* The same members, in the same order, as `Weights` in native.py. */
struct weights {
    const char *blocks;
    const float *scale;   /* of PLAIN I8: (rows, blocks of a row) */
    const void *bias;     /* (rows,) or NULL */
    const int64_t *order; /* (width,) or NULL: channel c of the weight reads channel order[c] of the activations */
    int64_t rows, width;
    int64_t count; /* blocks of a row */
    int64_t slots; /* values of a block */
    int32_t number, bias_number;
    int32_t kind;
    int32_t half; /* whether each 32 channels that start at a multiple of 32 keep exactly 16, those after the width excepted */
};

/* Activations as the kernels read them: groups of TILE_BATCH rows (the last may be smaller), and in a group, for each
 * block, the channels of each row in turn, with zeros after the width. */
struct staged {
    void *values;
    float *scale;   /* I8: for each group, block and row, the value of one integer step */
    int32_t *shift; /* I8: likewise, -128 times the sum of the integers: see family_i8.h */
    int64_t batch;
};

struct job {
    const struct weights *weights;
    const struct staged *staged;
    void *output; /* (batch, rows); (rows, width) to unpack */
    int32_t output_number;
};

typedef void rows_kernel(const struct job *job, int64_t first, int64_t last);

struct search_kernels; /* search/search.h */
struct cache_kernels;  /* attention/cache.h */

/* The kernels of one instruction set, by the type of the weight: `products`; `dense`, the same for PLAIN weights; and
 * `unpack`, which writes the weight with its zeros, (rows, width). `pairs` multiplies bf16 by bf16 if there is such an
 * instruction, else it is NULL. `stage_i8` rounds a row of activations for int8 weights (family_i8.h). */
struct kernels {
    const char *name;
    const struct search_kernels *search;
    const struct cache_kernels *cache;
    int (*runs_here)(void);
    void (*stage_i8)(const float *line, int64_t count, const struct staged *staged, int64_t place, int64_t apart);
    rows_kernel *products[NUMBERS];
    rows_kernel *dense[NUMBERS];
    rows_kernel *unpack[NUMBERS];
    int (*pairs_run_here)(void);
    rows_kernel *pairs, *dense_pairs;
};

extern const struct kernels avx512_kernels, avx2_kernels, neon_kernels, portable_kernels;
rows_kernel avx512_pairs, avx512_dense_pairs;
int avx512_pairs_run_here(void);

static ALWAYS_INLINE float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static ALWAYS_INLINE uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static ALWAYS_INLINE float bf16_to_f32(uint16_t value) { return from_bits((uint32_t)value << 16); }

static ALWAYS_INLINE uint16_t f32_to_bf16(float value)
{
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static ALWAYS_INLINE float f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00)
        return from_bits(sign | 0x7f800000 | magnitude << 13);
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f)); /* exact for subnormals too */
}

static ALWAYS_INLINE uint16_t f32_to_f16(float value)
{
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: the float adder rounds to multiples of 2^-24 */
        return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
    return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

static ALWAYS_INLINE float read_number(const void *numbers, int64_t index, int32_t number)
{
    if (number == F32)
        return ((const float *)numbers)[index];
    uint16_t bits = ((const uint16_t *)numbers)[index];
    return number == BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

static ALWAYS_INLINE void write_number(void *numbers, int64_t index, int32_t number, float value)
{
    if (number == F32)
        ((float *)numbers)[index] = value;
    else
        ((uint16_t *)numbers)[index] = number == BF16 ? f32_to_bf16(value) : f32_to_f16(value);
}

static ALWAYS_INLINE void write_output(const struct job *job, int64_t batch, int64_t row, float sum)
{
    const struct weights *weights = job->weights;
    if (weights->bias)
        sum += read_number(weights->bias, row, weights->bias_number);
    write_number(job->output, batch * weights->rows + row, job->output_number, sum);
}

/* The bytes before the values of a block, and those of a whole block. */
static ALWAYS_INLINE int64_t header_bytes(const struct weights *weights)
{
    return weights->kind == PLAIN ? 0 : weights->number == I8 ? HEADER_I8 : CODE;
}

static ALWAYS_INLINE int64_t block_bytes(const struct weights *weights)
{
    static const int64_t size[NUMBERS] = {[F32] = 4, [BF16] = 2, [F16] = 2, [I8] = 1};
    return header_bytes(weights) + weights->slots * size[weights->number];
}

static ALWAYS_INLINE uint64_t read_code(const char *block)
{
    uint64_t code;
    memcpy(&code, block, sizeof code);
    return code;
}

/* Of a block of I8. */
static ALWAYS_INLINE float read_scale(const char *block)
{
    float scale;
    memcpy(&scale, block + CODE, sizeof scale);
    return scale;
}

/* The mask with a bit for each channel that a code keeps. */
static ALWAYS_INLINE uint64_t kept_channels(uint64_t code, int32_t kind)
{
    if (kind == MASK)
        return code;
    const uint64_t ones = 0x1111111111111111;
    uint64_t mask = 0;
    UNROLLED for (int i = 0; i < 2; i++, code >>= 2) {
        uint64_t low = code & ones, high = code >> 1 & ones; /* the bits of a position in each group */
        mask |= (ones & ~(low | high)) | (low & ~high) << 1 | (high & ~low) << 2 | (low & high) << 3;
    }
    return mask;
}

/* Some floats of a row of the unpacked weight. */
static ALWAYS_INLINE void write_line(const struct job *job, int64_t row, int64_t channel, const float *line)
{
    const int64_t left = job->weights->width - channel, to = row * job->weights->width + channel;
    const int count = left < BLOCK ? (int)left : BLOCK;
    switch (job->output_number) { /* a separate loop for each type */
    case F32: memcpy((float *)job->output + to, line, (size_t)count * sizeof *line); break;
    case BF16:
        for (int c = 0; c < count; c++)
            write_number(job->output, to + c, BF16, line[c]);
        break;
    default:
        for (int c = 0; c < count; c++)
            write_number(job->output, to + c, F16, line[c]);
    }
}

/* The first `channels` channels of a block. */
static ALWAYS_INLINE uint64_t before(uint64_t bits, int channels) { return bits & ((1ull << channels) - 1); }

/* An address from which BLOCK values can be read: `from`, or, if the array ends before that, a padded copy in `room`.
 * `size` is the bytes of one value. */
static ALWAYS_INLINE const void *readable(const void *from, const void *end, void *room, size_t size)
{
    ptrdiff_t left = (const char *)end - (const char *)from;
    if (__builtin_expect(left >= (ptrdiff_t)(BLOCK * size), 1))
        return from;
    memset(room, 0, BLOCK * size);
    if (left > 0)
        memcpy(room, from, (size_t)left);
    return room;
}

/* With several groups of activations, the rows of a tile are read from memory for the first group and from the cache for
 * the others. So that memory is not idle then, each step of a tile fetches a part of the rows that follow its own.
 *
 * The tile has `height` rows, the first at `tile` and each `apart` bytes after the one before; a group has at most `most`
 * activations. The step multiplies group number `group` by block number `n`, of `size` bytes, of each row. */
static ALWAYS_INLINE void fetch_ahead(const struct job *job, const char *tile, int64_t apart, int64_t size, int height,
                                      int64_t most, int64_t group, int64_t n)
{
    const int64_t groups = (job->staged->batch + most - 1) / most, count = job->weights->count;
    const int64_t part = size * height / groups; /* of one of the rows, which take turns */
    if (groups == 1)
        return;
    const int64_t place = n % height * apart + count * size + (group * count + n) / height * part;
    for (int64_t byte = 0; byte < part; byte += 64) /* what is outside the weight is not fetched, and does no harm */
        __builtin_prefetch((const void *)((uintptr_t)tile + (uintptr_t)(place + byte)), 0, 2);
}

/* How far apart the rows of a tile of `height` rows are, if `left` rows are left. From tile to tile, each of its rows moves
 * to the next one: hardware follows a few long streams, but loses rows that jump over each other. The number is odd, so
 * that the rows do not meet in the same lines of a cache. */
static ALWAYS_INLINE int64_t rows_apart(int64_t left, int height) { return (left / height - 1) | 1; }

/* Runs TILE for tiles of `height` rows `apart` from each other, and makes `row` the first row that is left. */
#define FOR_TILES(height, TILE)                                                                                        \
    while (last - row >= (height)) {                                                                                   \
        const int64_t apart = rows_apart(last - row, height), stop = row + apart;                                      \
        for (; row < stop; row++)                                                                                      \
            TILE;                                                                                                      \
        row += ((height) - 1) * apart;                                                                                 \
    }

/* Divides the rows into tiles of TILE_ROWS, or of ALONE for one row of activations, and the rest one by one, and the
 * activations into groups of TILE_BATCH. The size of each tile is a compile-time constant. */
#define DEAL_TILES(NAME, TILE, ALONE) DEAL_TILES_(NAME, TILE, ALONE)
#define DEAL_TILES_(NAME, TILE, ALONE)                                                                                 \
    static ALWAYS_INLINE void NAME##_groups(const struct job *job, int64_t row, int64_t apart, const int height)       \
    {                                                                                                                  \
        const int64_t batch = job->staged->batch;                                                                      \
        for (int64_t group = 0; group * TILE_BATCH < batch; group++)                                                   \
            switch (batch - group * TILE_BATCH) {                                                                      \
            case 1: TILE(job, row, apart, group, height, 1); break;                                                    \
            case 2: TILE(job, row, apart, group, height, 2); break;                                                    \
            case 3: TILE(job, row, apart, group, height, 3); break;                                                    \
            default: TILE(job, row, apart, group, height, 4);                                                          \
            }                                                                                                          \
    }                                                                                                                  \
    static void NAME(const struct job *job, int64_t first, int64_t last)                                               \
    {                                                                                                                  \
        int64_t row = first;                                                                                           \
        if (job->staged->batch > 1)                                                                                    \
            FOR_TILES(TILE_ROWS, NAME##_groups(job, row, apart, TILE_ROWS))                                            \
        else if ((ALONE) > 1)                                                                                          \
            FOR_TILES(ALONE, TILE(job, row, apart, 0, ALONE, 1))                                                       \
        for (; row < last; row++)                                                                                      \
            NAME##_groups(job, row, 0, 1);                                                                             \
    }

#endif
