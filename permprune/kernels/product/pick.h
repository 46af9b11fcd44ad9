/* Weights of which every block keeps half: only the kept channels of the activations are picked and multiplied.
 *
 * Expects NAME; the type PLACES; DECODE(uint64_t code), the PLACES of a block's kept channels; and AT(PLACES, int step),
 * the INDEX of LANES of them in the 2 LANES channels from `step` * 2 LANES on.
 */
static ALWAYS_INLINE void PASTE(NAME, _add)(SUM sums[][TILE_BATCH][CHAINS], const char *const *block,
                                            const STAGED *x, int first, int chains, const int height, const int batch)
{
    PLACES places[TILE_ROWS];
    HALF values[TILE_ROWS];
    UNROLLED for (int r = 0; r < height; r++) {
        places[r] = DECODE(read_code(block[r]));
        values[r] = READ_HALF((const WEIGHT *)(block[r] + CODE));
    }
    UNROLLED for (int step = 0; step < STEPS / 2; step++) {
        VECTOR w[TILE_ROWS];
        INDEX index[TILE_ROWS];
        UNROLLED for (int r = 0; r < height; r++) {
            w[r] = PART(values[r], step);
            index[r] = AT(places[r], step);
        }
        UNROLLED for (int b = 0; b < batch; b++) {
            VECTOR low = LOAD(x + b * BLOCK + step * 2 * LANES);
            VECTOR high = LOAD(x + b * BLOCK + step * 2 * LANES + LANES);
            UNROLLED for (int r = 0; r < height; r++) {
                SUM *sum = &sums[r][b][(first + step) % chains];
                *sum = FMA(*sum, w[r], PICK(low, index[r], high));
            }
        }
    }
}

#define HEADER CODE
#define ADD(sums, block, weights, end, x, first, chains, height, batch)                                                \
    ((void)(end), PASTE(NAME, _add)(sums, block, x, first, chains, height, batch))
#include "product/product.h"
#undef DECODE
#undef AT
#undef PLACES
