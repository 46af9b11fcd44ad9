/* What the kernels of two_rows_floats.h and two_rows_i8.h share: 2:4 weights in batches, two rows of the weight at a time.
 *
 * A shuffle within groups of four channels is cheaper than `PICK`, which chooses from two vectors, and fills all its
 * lanes: of the four results of a group, two are what one row keeps, and two what another row keeps. The two rows share a
 * vector of sums, so that with the same registers a tile has twice the activations: it decodes the weight half as often.
 */
#ifndef PERMPRUNE_TWO_ROWS_H
#define PERMPRUNE_TWO_ROWS_H

#include "product/packed.h"

enum { WIDE_BATCH = 2 * TILE_BATCH }; /* rows of the activations that a tile multiplies at once: two groups of staged ones */
enum { PAIRS = TILE_ROWS / 2 };       /* of rows of the weight */

/* The place among the staged blocks of block `n` of row `b` of the activations of a tile: of pair `pair` of groups, in which
 * there are `batch` rows. */
static ALWAYS_INLINE int64_t wide_place(int64_t pair, int64_t count, int64_t n, int b, const int batch)
{
    const int64_t first = pair * WIDE_BATCH * count, second = first + TILE_BATCH * count;
    if (b < TILE_BATCH)
        return first + n * (batch < TILE_BATCH ? batch : TILE_BATCH) + b;
    return second + n * (batch - TILE_BATCH) + b - TILE_BATCH;
}

/* As DEFINE_TILED, but the rest of the rows is left: NAME returns the first of them. */
#define DEFINE_WIDE_TILED(NAME, TILE) DEFINE_WIDE_TILED_(NAME, TILE)
#define DEFINE_WIDE_TILED_(NAME, TILE)                                                                                 \
    static ALWAYS_INLINE void NAME##_groups(const struct product *job, int64_t row, int64_t apart)                     \
    {                                                                                                                  \
        const int64_t batch = job->staged->batch;                                                                      \
        for (int64_t pair = 0; pair * WIDE_BATCH < batch; pair++)                                                      \
            switch (batch - pair * WIDE_BATCH) {                                                                       \
            case 1: TILE(job, row, apart, pair, 1); break;                                                             \
            case 2: TILE(job, row, apart, pair, 2); break;                                                             \
            case 3: TILE(job, row, apart, pair, 3); break;                                                             \
            case 4: TILE(job, row, apart, pair, 4); break;                                                             \
            case 5: TILE(job, row, apart, pair, 5); break;                                                             \
            case 6: TILE(job, row, apart, pair, 6); break;                                                             \
            case 7: TILE(job, row, apart, pair, 7); break;                                                             \
            default: TILE(job, row, apart, pair, 8);                                                                   \
            }                                                                                                          \
    }                                                                                                                  \
    static int64_t NAME(const struct product *job, int64_t first, int64_t last)                                        \
    {                                                                                                                  \
        int64_t row = first;                                                                                           \
        FOR_TILES(TILE_ROWS, NAME##_groups(job, row, apart))                                                           \
        return row;                                                                                                    \
    }

#endif
