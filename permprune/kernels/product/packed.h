/* Packed N:M weights, and products with activations: the definitions that all kernels share.
 *
 * A weight of `rows` x `width` keeps n of every m consecutive weights of a row. A row is a sequence of blocks of BLOCK
 * channels, so that a product reads memory from front to back. A block is
 *
 *     code     8 bytes that say which channels are kept
 *     scale    of integers, the value of one step: fp32 of I8, and of I4 two bytes for all of its parts
 *     values   `slots` numbers: the kept weights in channel order, then zeros
 *
 * An integer of I4 is from -8 to 7, plus 8 in four bits: two of them in a byte, the first in its low bits. `slots` is a
 * multiple of four then. Each PART channels have a scale of their own, a positive float with three bits of mantissa, those
 * of the first channels in the lowest bits of the two bytes. The upper four are the exponent of all, from that of
 * LEAST_POWER on, as in the bits of a float.
 *
 * A code of kind MASK has a bit for every channel; the bits after the width are zero. One of kind POSITIONS, for 2:4, has
 * four bits for each group of four channels: the position of the first kept channel in bits 0 and 1, that of the second
 * in bits 2 and 3. After the width the positions are 0 and 1, and the values zeros. No code can refer to a channel
 * outside its block; a kernel never reads outside the blocks, whatever the codes are.
 *
 * Of I4 and POSITIONS a kept weight is twice its integer, or, in groups whose first position is behind the second
 * (`turned`), twice its integer plus one, which a code of an order has no other use for. The integers follow the positions.
 *
 * PLAIN weights, tables of int8 and dense layers, have no codes, all values, and their scales elsewhere.
 */
#ifndef PERMPRUNE_PACKED_H
#define PERMPRUNE_PACKED_H

#include "numbers.h"

enum { BLOCK = 64 };     /* channels of a block */
enum { CODE = 8 };       /* bytes of a code */
enum { HEADER_I8 = 12, HEADER_I4 = 10 }; /* bytes of a code and a scale */
enum { PART = 16, LEAST_POWER = (127 - 13) << 23 }; /* of the scales of I4 */
enum { I4 = NUMBERS, STORED };           /* the types of weights: numbers, and I4 */
enum { TILE_ROWS = 4 };  /* rows of the weight that a tile multiplies at once */
enum { TILE_BATCH = 4 }; /* rows of the activations that a tile multiplies at once */

/* Of the tiles of two_rows.h: */
enum { WIDE_BATCH = 2 * TILE_BATCH }; /* rows of the activations that a tile multiplies at once: two groups of staged ones */
enum { PAIRS = TILE_ROWS / 2 };       /* of rows of the weight */

enum kind { MASK, POSITIONS, PLAIN, KINDS };

STRUCTURE(weights, {
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
})

/* Blocks of a weight (rows, width) and a mask. Without an order they are of F32 and keep whatever the mask keeps: with codes of
 * kind MASK and BLOCK slots, of which those after the kept ones are not written. With one they are of BF16 and POSITIONS, and
 * the mask keeps two of each four columns that follow each other in this order. */
STRUCTURE(compress, {
    const void *weight;   /* the numbers of a row are side by side */
    const uint8_t *bits;  /* (rows, (width + 7) / 8), channel 0 in the highest bit of a byte: 1 where a weight is kept */
    const int64_t *order; /* (width,) or NULL */
    char *blocks;
    int64_t rows, width;
    int64_t row_stride; /* of the weight, in numbers */
    int32_t number;     /* of the weight: F32, or BF16 with an order */
})

/* Whether what is said of a weight contradicts itself: kernels rely on it and on nothing that a block contains. */
int weights_are_bad(const struct weights *weights);

/* Activations as the kernels read them: groups of TILE_BATCH rows (the last may be smaller), and in a group, for each
 * block, the channels of each row in turn, with zeros after the width. */
struct staged {
    void *values;
    float *scale;   /* of integers: for each group, block and row, the value of one integer step */
    int64_t batch;
};

struct product {
    const struct weights *weights;
    const struct staged *staged;
    void *output; /* (batch, rows); (rows, width) to unpack */
    int32_t output_number;
};

/* Returns the `status` of what is said of a product: sizes, types, pointers and the order of channels. */
int32_t check_product(const struct weights *weights, const void *activations, int32_t number, int64_t batch, const void *output);

/* Replaces the products of the rows of activations that are not finite. `line` has room for a row. */
void correct_nonfinite(const struct product *job, const void *activations, int32_t number, float *line);

/* Of many.h: */
enum { CHUNK = 64 }; /* rows of the weight */
enum { TILES = 4 };  /* tiles of tokens */

/* A product with many rows of activations, "tokens". The values of `staged` are lines of tokens: see many.h. */
struct many {
    struct product product;
    const void *activations; /* (batch, width), of the type of the output */
    int64_t tiles;
    int64_t first, last; /* the tiles whose lines are in `staged` */
};

/* Of many_pairs.h: */
enum { PAIR_TOKENS = 64 };  /* the most of a tile */
enum { PAIR_CHUNK = 1024 }; /* the most rows of the weight whose sums are kept: 256 KiB */

/* Of many_tiles.h: */
enum { TILE_PANEL = 32, TILE_TOKENS = 32 }; /* rows of the weight and tokens whose sums are in registers */
enum { TILE_BLOCKS = 9, TILE_PANELS = 16 };  /* the most blocks of a row, and panels, that are multiplied at a time */

/* A product of many rows of activations in bf16, in fp32 that is rounded to bf16, or, of many_tiles.h, in parts of bf16. */
struct many_pairs {
    const struct weights *weights;
    const void *activations;     /* (batch, width) of `number` */
    uint16_t *channels;          /* (tiles, channels in whole blocks, PAIR_TOKENS): the activations, turned */
    void *output;                /* (batch, rows) of `number` */
    int32_t number;
    int32_t *nonfinite;          /* becomes 1 if some of the activations are not finite */
    int64_t batch, tiles;
    int64_t chunk, chunks; /* rows of the weight that are multiplied at a time */
    int64_t blocks;        /* of many_tiles.h: those of a row that are multiplied at a time */
    float *sums;           /* of many_tiles.h: (chunks, chunk, tokens in pairs of groups) */
};

static ALWAYS_INLINE void write_output(const struct product *job, int64_t batch, int64_t row, float sum)
{
    const struct weights *weights = job->weights;
    if (weights->bias)
        sum += read_number(weights->bias, row, weights->bias_number);
    write_number(job->output, batch * weights->rows + row, job->output_number, sum);
}

/* Whether weights are integers, which are multiplied by activations that are rounded to integers. */
static ALWAYS_INLINE int are_integers(const struct weights *weights) { return weights->number >= I8; }

/* The most parts in bf16 whose sum a number is: those of a type, and of activations, which are rounded beside integers. */
enum { PARTS = 3 };
static ALWAYS_INLINE int parts_of(int32_t number) { return number == F32 ? PARTS : number == F16 ? 2 : 1; }
static ALWAYS_INLINE int token_parts(const struct weights *weights, int32_t number)
{
    return are_integers(weights) ? 1 : parts_of(number);
}

/* The pairs of groups of 16 tokens. */
static ALWAYS_INLINE int64_t pairs_of_groups(int64_t tokens) { return (tokens + TILE_TOKENS - 1) / TILE_TOKENS; }

/* The bytes before the values of a block, and those of a whole block. */
static ALWAYS_INLINE int64_t header_bytes(const struct weights *weights)
{
    static const int64_t header[STORED] = {[F32] = CODE, [BF16] = CODE, [F16] = CODE, [I8] = HEADER_I8, [I4] = HEADER_I4};
    return weights->kind == PLAIN ? 0 : header[weights->number];
}

static ALWAYS_INLINE int64_t block_bytes(const struct weights *weights)
{
    static const int64_t bits[STORED] = {[F32] = 32, [BF16] = 16, [F16] = 16, [I8] = 8, [I4] = 4};
    return header_bytes(weights) + weights->slots * bits[weights->number] / 8;
}

static ALWAYS_INLINE uint64_t read_code(const char *block)
{
    uint64_t code;
    memcpy(&code, block, sizeof code);
    return code;
}

/* The scales of a block of I4. */
static ALWAYS_INLINE uint32_t read_scales(const char *block)
{
    uint16_t scales;
    memcpy(&scales, block + CODE, sizeof scales);
    return scales;
}

/* Of a block of integers, the scale of a channel. */
static ALWAYS_INLINE float read_scale(const char *block, int32_t number, int channel)
{
    float scale;
    if (number == I4) {
        const uint32_t scales = read_scales(block), own = scales >> 3 * (channel / PART) & 7;
        return from_bits((LEAST_POWER + (scales >> 12 << 23)) | own << 20);
    }
    memcpy(&scale, block + CODE, sizeof scale);
    return scale;
}

/* A one in the lowest bit of each group of a code of POSITIONS whose first position is behind the second. */
static ALWAYS_INLINE uint64_t turned(uint64_t code)
{
    const uint64_t low = code & ~(code >> 2), equal = ~(code ^ code >> 2), high = low >> 1;
    return (high | (equal >> 1 & low)) & 0x1111111111111111;
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

/* Writes `count` floats as numbers, from index `to` on. */
static ALWAYS_INLINE void write_floats(void *numbers, int64_t to, int32_t number, const float *line, int count)
{
    switch (number) { /* a separate loop for each type */
    case F32: memcpy((float *)numbers + to, line, (size_t)count * sizeof *line); break;
    case BF16:
        if (count == BLOCK) /* whose loop becomes vectors */
            for (int c = 0; c < BLOCK; c++)
                write_number(numbers, to + c, BF16, line[c]);
        else
            for (int c = 0; c < count; c++)
                write_number(numbers, to + c, BF16, line[c]);
        break;
    default:
        for (int c = 0; c < count; c++)
            write_number(numbers, to + c, F16, line[c]);
    }
}

/* Some floats of a row of the unpacked weight. */
static ALWAYS_INLINE void write_line(const struct product *job, int64_t row, int64_t channel, const float *line)
{
    const int64_t left = job->weights->width - channel, to = row * job->weights->width + channel;
    write_floats(job->output, to, job->output_number, line, left < BLOCK ? (int)left : BLOCK);
}

/* Reads `count` channels of a row of activations in the weight's order, from `channel` on. */
static ALWAYS_INLINE void read_channels(const struct weights *weights, const void *x, int64_t row, int64_t channel,
                                        int64_t count, int32_t number, float *to)
{
    const int64_t first = row * weights->width;
    if (weights->order)
        for (int64_t c = 0; c < count; c++)
            to[c] = read_number(x, first + weights->order[channel + c], number);
    else
        for (int64_t c = 0; c < count; c++)
            to[c] = read_number(x, first + channel + c, number);
}

/* Reads a block of channels of a row of activations of type `number`, with zeros after the width. */
static ALWAYS_INLINE void read_block(const struct weights *weights, const void *x, int64_t row, int64_t n, int32_t number,
                                     float *to)
{
    const int64_t channel = n * BLOCK, count = smaller(BLOCK, weights->width - channel);
    switch (number) { /* a separate loop for each type */
    case F32: read_channels(weights, x, row, channel, count, F32, to); break;
    case BF16: read_channels(weights, x, row, channel, count, BF16, to); break;
    default: read_channels(weights, x, row, channel, count, F16, to);
    }
    for (int64_t c = count; c < BLOCK; c++)
        to[c] = 0;
}

/* The first `channels` channels of a block. */
static ALWAYS_INLINE uint64_t before(uint64_t bits, int channels) { return bits & ((1ull << channels) - 1); }

/* An address from which `size` bytes can be read: `from`, or, if the array ends before that, a padded copy in `room`. */
static ALWAYS_INLINE const void *readable(const void *from, const void *end, void *room, size_t size)
{
    ptrdiff_t left = (const char *)end - (const char *)from;
    if (__builtin_expect(left >= (ptrdiff_t)size, 1))
        return from;
    memset(room, 0, size);
    if (left > 0)
        memcpy(room, from, (size_t)left);
    return room;
}

/* The place among the staged blocks of block `n` of row `b` of the activations of a tile: of pair `pair` of groups, in which
 * there are `batch` rows. */
static ALWAYS_INLINE int64_t wide_place(int64_t pair, int64_t count, int64_t n, int b, const int batch)
{
    const int64_t first = pair * WIDE_BATCH * count, second = first + TILE_BATCH * count;
    if (b < TILE_BATCH)
        return first + n * (batch < TILE_BATCH ? batch : TILE_BATCH) + b;
    return second + n * (batch - TILE_BATCH) + b - TILE_BATCH;
}

/* With several groups of activations, the rows of a tile are read from memory for the first group and from the cache for
 * the others. So that memory is not idle then, each step of a tile fetches a part of the rows that follow its own.
 *
 * The tile has `height` rows, the first at `tile` and each `apart` bytes after the one before; a group has at most `most`
 * activations. The step multiplies group number `group` by block number `n`, of `size` bytes, of each row. */
static ALWAYS_INLINE void fetch_ahead(const struct product *job, const char *tile, int64_t apart, int64_t size, int height,
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

/* Defines a kernel NAME that divides the rows into tiles of TILE_ROWS, or of ALONE for one row of activations, and the rest
 * one by one, and the activations into groups of TILE_BATCH. The size of each tile is a compile-time constant. */
#define DEFINE_TILED(NAME, TILE, ALONE) DEFINE_TILED_(NAME, TILE, ALONE)
#define DEFINE_TILED_(NAME, TILE, ALONE)                                                                               \
    static ALWAYS_INLINE void NAME##_groups(const struct product *job, int64_t row, int64_t apart, const int height)   \
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
    static void NAME(const void *argument, int64_t first, int64_t last)                                                     \
    {                                                                                                                  \
        const struct product *job = argument;                                                                               \
        int64_t row = first;                                                                                           \
        if (job->staged->batch > 1)                                                                                    \
            FOR_TILES(TILE_ROWS, NAME##_groups(job, row, apart, TILE_ROWS))                                            \
        else if ((ALONE) > 1)                                                                                          \
            FOR_TILES(ALONE, TILE(job, row, apart, 0, ALONE, 1))                                                       \
        for (; row < last; row++)                                                                                      \
            NAME##_groups(job, row, 0, 1);                                                                             \
    }

#endif
