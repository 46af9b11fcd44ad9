/* y = x W^T in floating point, two rows of the weight at a time (two_rows.h); family.h includes this file.
 *
 * Expects, besides what family.h does, TWO_CODES(const char *, const char *), the codes of two blocks, a CODES;
 * INDEX_IN_GROUPS(CODES, int step), the INDEX of what both keep of the channels of vector `step`, for
 * PICK_IN_GROUPS(VECTOR, INDEX); ALTERNATE(VECTOR, VECTOR, int half), one half of two vectors of kept values, in the same
 * order; and TOTAL_OF_ROW(SUM, int row), of row 0 or 1.
 */
#define TILE PASTE(two_rows_tile_, KIND)

static ALWAYS_INLINE void TILE(const struct product *job, int64_t row, int64_t apart, int64_t pair, const int batch)
{
    const struct weights *weights = job->weights;
    const int64_t count = weights->count, size = CODE + weights->slots * (int64_t)sizeof(WEIGHT);
    const char *const tile = weights->blocks + row * count * size;
    const char *block[TILE_ROWS];
    SUM sums[PAIRS][WIDE_BATCH];
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        block[r] = tile + r * apart * count * size;
    UNROLLED for (int p = 0; p < PAIRS; p++)
        UNROLLED for (int b = 0; b < batch; b++)
            sums[p][b] = ZERO();
    for (int64_t n = 0; n < count; n++) {
        CODES codes[PAIRS];
        fetch_ahead(job, tile, apart * count * size, size, TILE_ROWS, WIDE_BATCH, pair, n);
        UNROLLED for (int p = 0; p < PAIRS; p++)
            codes[p] = TWO_CODES(block[2 * p], block[2 * p + 1]);
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
                const int64_t place = wide_place(pair, count, n, b, batch) * BLOCK + step * LANES;
                VECTOR channels = LOAD((const STAGED *)job->staged->values + place);
                UNROLLED for (int p = 0; p < PAIRS; p++)
                    sums[p][b] = FMA(sums[p][b], w[p], PICK_IN_GROUPS(channels, index[p]));
            }
        }
        UNROLLED for (int r = 0; r < TILE_ROWS; r++)
            block[r] += size;
    }
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int b = 0; b < batch; b++)
            write_output(job, pair * WIDE_BATCH + b, row + r * apart, TOTAL_OF_ROW(sums[r / 2][b], r % 2));
}

DEFINE_WIDE_TILED(PASTE(two_rows_, KIND), TILE)

#undef TILE
