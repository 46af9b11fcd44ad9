/* y = x W^T for 2:4 weights in batches, two rows of the weight at a time: NAME, a kernel for whole tiles of rows, which
 * returns the first of the rows that are left.
 *
 * A shuffle within groups of four channels is cheaper than `PICK`, which chooses from two vectors, and fills all its
 * lanes: of the four results of a group, two are what one row keeps, and two what another row keeps. The two rows share a
 * vector of sums, so that with the same registers a tile has twice the activations: it decodes the weight half as often.
 *
 * Expects NAME; SUM, ZERO, and TOTAL_OF_ROW(SUM, int row), of row 0 or 1;
 * READ_TWO(const char *, const char *), what is read of two blocks, a TWO; and ADD_TWO(sums, two, block, job, pair, n,
 * batch), which adds the products of a block of each row with block `n` of the activations to the sums.
 */
static ALWAYS_INLINE void PASTE(NAME, _tile)(const struct product *job, int64_t row, int64_t apart, int64_t pair,
                                             const int batch)
{
    const struct weights *weights = job->weights;
    const int64_t count = weights->count, size = block_bytes(weights);
    const char *const tile = weights->blocks + row * count * size;
    const char *block[TILE_ROWS];
    SUM sums[PAIRS][WIDE_BATCH];
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        block[r] = tile + r * apart * count * size;
    UNROLLED for (int p = 0; p < PAIRS; p++)
        UNROLLED for (int b = 0; b < batch; b++)
            sums[p][b] = ZERO();
    for (int64_t n = 0; n < count; n++) {
        TWO two[PAIRS];
        fetch_ahead(job, tile, apart * count * size, size, TILE_ROWS, WIDE_BATCH, pair, n);
        UNROLLED for (int p = 0; p < PAIRS; p++)
            two[p] = READ_TWO(block[2 * p], block[2 * p + 1]);
        ADD_TWO(sums, two, block, job, pair, n, batch);
        UNROLLED for (int r = 0; r < TILE_ROWS; r++)
            block[r] += size;
    }
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int b = 0; b < batch; b++)
            write_output(job, pair * WIDE_BATCH + b, row + r * apart, TOTAL_OF_ROW(sums[r / 2][b], r % 2));
}

static ALWAYS_INLINE void PASTE(NAME, _groups)(const struct product *job, int64_t row, int64_t apart)
{
    const int64_t batch = job->staged->batch;
    for (int64_t pair = 0; pair * WIDE_BATCH < batch; pair++)
        switch (batch - pair * WIDE_BATCH) {
        case 1: PASTE(NAME, _tile)(job, row, apart, pair, 1); break;
        case 2: PASTE(NAME, _tile)(job, row, apart, pair, 2); break;
        case 3: PASTE(NAME, _tile)(job, row, apart, pair, 3); break;
        case 4: PASTE(NAME, _tile)(job, row, apart, pair, 4); break;
        case 5: PASTE(NAME, _tile)(job, row, apart, pair, 5); break;
        case 6: PASTE(NAME, _tile)(job, row, apart, pair, 6); break;
        case 7: PASTE(NAME, _tile)(job, row, apart, pair, 7); break;
        default: PASTE(NAME, _tile)(job, row, apart, pair, 8);
        }
}

static int64_t NAME(const struct product *job, int64_t first, int64_t last)
{
    int64_t row = first;
    FOR_TILES(TILE_ROWS, PASTE(NAME, _groups)(job, row, apart))
    return row;
}

#undef NAME
#undef TWO
#undef READ_TWO
#undef ADD_TWO
