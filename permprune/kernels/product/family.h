/* The kernels for one pair of number types: `product_KIND` and, if vectors can be stored as floats, `unpack_KIND` for
 * packed weights, and `dense_KIND` for PLAIN ones.
 *
 * Expects KIND; WEIGHT and STAGED, the types of weight and activations in memory; LANES; the types VECTOR and SUM;
 * LOAD(const STAGED *), a VECTOR; KEPT(const WEIGHT *), the next LANES values, a VECTOR; EXPAND(const WEIGHT *, uint64_t
 * bits), the next values put where `bits` has ones and zeros between, which may read LANES values; ZERO(),
 * FMA(SUM, VECTOR, VECTOR) and TOTAL(SUM); and STORE(float *, VECTOR), where the vectors are floats.
 *
 * UNPACK_16(const struct product *, int64_t first, int64_t last) may be a fast way to unpack numbers of 16 bits as they are.
 *
 * If activations can be picked by an index, also the type INDEX; PICK(VECTOR, INDEX, VECTOR); READ_HALF(const WEIGHT *),
 * BLOCK / 2 values as a HALF, and PART(HALF, int step), LANES of them; and for each kind of code what pick.h expects:
 * MASK_PLACES, DECODE_MASK and AT_MASK, and the same of POSITIONS. Then weights that keep half of
 * each block are multiplied that way. Expanding the weight works for any pattern.
 *
 * If PICK_IN_GROUPS(VECTOR, INDEX) is defined, those with POSITIONS are multiplied two rows at a time (two_rows.h) in batches
 * of TWO_ROWS_FROM and more. Expects then TWO_CODES(const char *, const char *), the codes of two blocks, a CODES;
 * INDEX_IN_GROUPS(CODES, int step), the INDEX of what both keep of the channels of vector `step`; ALTERNATE(VECTOR, VECTOR,
 * int half), one half of two vectors of kept values, in the same order; and TOTAL_OF_ROW.
 */
#define STEPS (BLOCK / LANES)
#define CHAINS (STEPS < 4 ? 2 : 4)

/* Adds the products of a block of each row with all channels: of `plain` weights, or of what a code keeps, in its place. */
static ALWAYS_INLINE void PASTE(add_whole_, KIND)(SUM sums[][TILE_BATCH][CHAINS], const char *const *block,
                                                  int32_t kind, const char *end, const STAGED *x, int first, int chains,
                                                  const int height, const int batch, const int plain)
{
    uint64_t bits[TILE_ROWS];
    const WEIGHT *values[TILE_ROWS];
    WEIGHT room[TILE_ROWS][BLOCK];
    UNROLLED for (int r = 0; r < height && !plain; r++) {
        bits[r] = kept_channels(read_code(block[r]), kind);
        values[r] = readable(block[r] + CODE, end, room[r], BLOCK * sizeof(WEIGHT));
    }
    UNROLLED for (int step = 0; step < STEPS; step++) {
        VECTOR w[TILE_ROWS];
        UNROLLED for (int r = 0; r < height; r++)
            w[r] = plain ? KEPT((const WEIGHT *)block[r] + step * LANES)
                         : EXPAND(values[r] + __builtin_popcountll(before(bits[r], step * LANES)), bits[r] >> step * LANES);
        UNROLLED for (int b = 0; b < batch; b++) {
            VECTOR channels = LOAD(x + b * BLOCK + step * LANES);
            UNROLLED for (int r = 0; r < height; r++) {
                SUM *sum = &sums[r][b][(first + step) % chains];
                *sum = FMA(*sum, w[r], channels);
            }
        }
    }
}

#define NAME PASTE(expand_, KIND)
#define HEADER CODE
#define ADD(sums, block, weights, end, x, first, chains, height, batch)                                                \
    PASTE(add_whole_, KIND)(sums, block, (weights)->kind, end, x, first, chains, height, batch, 0)
#include "product/product.h"

#define NAME PASTE(dense_, KIND)
#define HEADER 0
#define ADD(sums, block, weights, end, x, first, chains, height, batch)                                                \
    PASTE(add_whole_, KIND)(sums, block, PLAIN, end, x, first, chains, height, batch, 1)
#include "product/product.h"

#ifdef PICK
#define NAME PASTE(mask_, KIND)
#define PLACES MASK_PLACES
#define DECODE DECODE_MASK
#define AT AT_MASK
#include "product/pick.h"

#define NAME PASTE(positions_, KIND)
#define PLACES POSITIONS_PLACES
#define DECODE DECODE_POSITIONS
#define AT AT_POSITIONS
#include "product/pick.h"
#endif

#ifdef PICK_IN_GROUPS
static ALWAYS_INLINE void PASTE(add_two_, KIND)(SUM sums[][WIDE_BATCH], const CODES *codes, const char *const *block,
                                                const struct product *job, int64_t pair, int64_t n, const int batch)
{
    UNROLLED for (int step = 0; step < STEPS; step++) {
        VECTOR w[PAIRS];
        INDEX index[PAIRS];
        UNROLLED for (int p = 0; p < PAIRS; p++) {
            const int64_t kept = CODE + step / 2 * LANES * (int64_t)sizeof(WEIGHT);
            w[p] = ALTERNATE(KEPT((const WEIGHT *)(block[2 * p] + kept)),
                             KEPT((const WEIGHT *)(block[2 * p + 1] + kept)), step % 2);
            index[p] = INDEX_IN_GROUPS(codes[p], step);
        }
        UNROLLED for (int b = 0; b < batch; b++) {
            const int64_t place = wide_place(pair, job->weights->count, n, b, batch) * BLOCK + step * LANES;
            VECTOR channels = LOAD((const STAGED *)job->staged->values + place);
            UNROLLED for (int p = 0; p < PAIRS; p++)
                sums[p][b] = FMA(sums[p][b], w[p], PICK_IN_GROUPS(channels, index[p]));
        }
    }
}

#define NAME PASTE(two_rows_, KIND)
#define TWO CODES
#define READ_TWO(first, second) TWO_CODES(first, second)
#define ADD_TWO PASTE(add_two_, KIND)
#include "product/two_rows.h"
#endif

static void PASTE(product_, KIND)(const void *argument, int64_t first, int64_t last)
{
    const struct product *job = argument;
    const int32_t kind = job->weights->kind;
#ifdef PICK_IN_GROUPS
    if (job->weights->half && kind == POSITIONS && job->staged->batch >= TWO_ROWS_FROM)
        first = PASTE(two_rows_, KIND)(job, first, last);
#endif
#ifdef PICK
    if (job->weights->half) {
        kind == POSITIONS ? PASTE(positions_, KIND)(job, first, last) : PASTE(mask_, KIND)(job, first, last);
        return;
    }
#endif
    (void)kind;
    PASTE(expand_, KIND)(job, first, last);
}

#ifdef STORE
static void PASTE(unpack_, KIND)(const void *argument, int64_t first, int64_t last)
{
    const struct product *job = argument;
    const struct weights *weights = job->weights;
#ifdef UNPACK_16
    if (sizeof(WEIGHT) == sizeof(uint16_t) && job->output_number == weights->number) {
        UNPACK_16(job, first, last);
        return;
    }
#endif
    const int64_t size = CODE + weights->slots * (int64_t)sizeof(WEIGHT);
    const char *block = weights->blocks + first * weights->count * size;
    const char *end = weights->blocks + weights->rows * weights->count * size;
    WEIGHT room[BLOCK];
    float line[BLOCK] __attribute__((aligned(64)));
    for (int64_t row = first; row < last; row++)
        for (int64_t n = 0; n < weights->count; n++, block += size) {
            uint64_t bits = kept_channels(read_code(block), weights->kind);
            const WEIGHT *values = readable(block + CODE, end, room, BLOCK * sizeof(WEIGHT));
            for (int step = 0; step < BLOCK; step += LANES)
                STORE(line + step, EXPAND(values + __builtin_popcountll(before(bits, step)), bits >> step));
            write_line(job, row, n * BLOCK, line);
        }
}
#endif

#undef KIND
#undef WEIGHT
#undef KEPT
#undef HALF
#undef READ_HALF
#undef PART
#undef STEPS
#undef CHAINS
