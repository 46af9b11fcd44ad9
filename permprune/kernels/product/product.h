/* y = x W^T in floating point, with one way of reading the weight; family.h includes this file for each way.
 *
 * Expects NAME; HEADER, the bytes before the values of a block; and the loops of one way (family.h) as ADD(sums, block,
 * weights, end, x, first, chains, height, batch), which adds the products of a block of each row to the sums, from chain
 * `first` on.
 */
#define TILE PASTE(NAME, _tile)

static ALWAYS_INLINE void TILE(const struct product *job, int64_t row, int64_t apart, int64_t group, const int height,
                               const int batch)
{
    const struct weights *weights = job->weights;
    const int64_t size = HEADER + weights->slots * (int64_t)sizeof(WEIGHT), count = weights->count;
    const char *end = weights->blocks + weights->rows * count * size;
    const STAGED *x = (const STAGED *)job->staged->values + group * TILE_BATCH * count * BLOCK;
    const int chains = height == 1 ? CHAINS : 1; /* independent sums, to hide the latency of additions */
    const char *block[TILE_ROWS];
    SUM sums[TILE_ROWS][TILE_BATCH][CHAINS];
    UNROLLED for (int r = 0; r < height; r++) {
        block[r] = weights->blocks + (row + r * apart) * count * size;
        UNROLLED for (int b = 0; b < batch; b++)
            UNROLLED for (int c = 0; c < chains; c++)
                sums[r][b][c] = ZERO();
    }
    const char *const tile = block[0];
    int64_t n = 0;
    /* Two at once hide latency, but prefetchers follow each load instruction: with more of them they lose the stream. */
    if (height == 1 && sizeof(WEIGHT) == sizeof(STAGED))
        for (; n + 1 < count; n += 2, x += 2 * batch * BLOCK) {
            ADD(sums, block, weights, end, x, 0, chains, height, batch);
            block[0] += size;
            ADD(sums, block, weights, end, x + batch * BLOCK, CHAINS / 2, chains, height, batch);
            block[0] += size;
        }
    for (; n < count; n++, x += batch * BLOCK) {
        fetch_ahead(job, tile, apart * count * size, size, height, TILE_BATCH, group, n);
        ADD(sums, block, weights, end, x, 0, chains, height, batch);
        UNROLLED for (int r = 0; r < height; r++)
            block[r] += size;
    }
    UNROLLED for (int r = 0; r < height; r++)
        UNROLLED for (int b = 0; b < batch; b++) {
            float result = 0;
            UNROLLED for (int c = 0; c < chains; c++)
                result += TOTAL(sums[r][b][c]);
            write_output(job, group * TILE_BATCH + b, row + r * apart, result);
        }
}

DEFINE_TILED(NAME, TILE, 1)

#undef TILE
#undef NAME
#undef HEADER
#undef ADD
