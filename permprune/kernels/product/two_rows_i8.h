/* y = x W^T in integers, two rows of the weight at a time (two_rows.h): `two_rows_i8`.
 *
 * Expects the types VECTOR (BLOCK int8) and SUM (float lanes); LOAD, ZERO and TOTAL_OF_ROW(SUM, int row), of row 0 or 1;
 * READ_TWO(const char *, const char *), two blocks, as TWO_BLOCKS; and ADD_DOT(SUM, TWO_BLOCKS, VECTOR x, float scale),
 * which adds their products with x, times `scale` and their own scales.
 */
static ALWAYS_INLINE void two_rows_i8_tile(const struct product *job, int64_t row, int64_t apart, int64_t pair, const int batch)
{
    const struct weights *weights = job->weights;
    const int64_t count = weights->count, size = HEADER_I8 + weights->slots;
    const char *const tile = weights->blocks + row * count * size;
    const char *block[TILE_ROWS];
    SUM sums[PAIRS][WIDE_BATCH];
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        block[r] = tile + r * apart * count * size;
    UNROLLED for (int p = 0; p < PAIRS; p++)
        UNROLLED for (int b = 0; b < batch; b++)
            sums[p][b] = ZERO();
    for (int64_t n = 0; n < count; n++) {
        TWO_BLOCKS two[PAIRS];
        fetch_ahead(job, tile, apart * count * size, size, TILE_ROWS, WIDE_BATCH, pair, n);
        UNROLLED for (int p = 0; p < PAIRS; p++)
            two[p] = READ_TWO(block[2 * p], block[2 * p + 1]);
        UNROLLED for (int b = 0; b < batch; b++) {
            const int64_t place = wide_place(pair, count, n, b, batch);
            VECTOR channels = LOAD((const int8_t *)job->staged->values + place * BLOCK);
            UNROLLED for (int p = 0; p < PAIRS; p++)
                sums[p][b] = ADD_DOT(sums[p][b], two[p], channels, job->staged->scale[place]);
        }
        UNROLLED for (int r = 0; r < TILE_ROWS; r++)
            block[r] += size;
    }
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int b = 0; b < batch; b++)
            write_output(job, pair * WIDE_BATCH + b, row + r * apart, TOTAL_OF_ROW(sums[r / 2][b], r % 2));
}

DEFINE_WIDE_TILED(two_rows_i8, two_rows_i8_tile)
