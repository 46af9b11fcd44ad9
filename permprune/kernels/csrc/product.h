/* y = x W^T in floating point, with one way of reading the weight; family.h includes this file for each way.
 *
 * Expanding the weight (values moved to the ones of the mask, with zeros between) works for any pattern and width. If
 * half of every word is kept, PICKING needs only half the multiplications: it picks the activations of the kept
 * channels. For `dense_KIND` (family.h) every weight is kept, and no mask is read.
 */
#define TILE PASTE(NAME, _tile)

static ALWAYS_INLINE void TILE(const struct job *job, int64_t row, int64_t group, const int height, const int batch)
{
    enum { STEPS = WORD / LANES, CHAINS = STEPS < 4 ? STEPS : 4 };
    const struct weights *weights = job->weights;
    const WEIGHT *end = (const WEIGHT *)weights->values + weights->rows * weights->kept;
    const STAGED *x = (const STAGED *)job->staged->values + group * TILE_BATCH * weights->words * WORD;
    const int chains = height == 1 ? CHAINS : 1; /* independent sums, to hide the latency of additions */
    const WEIGHT *values[TILE_ROWS], *from[TILE_ROWS];
    const uint8_t *mask[TILE_ROWS];
    uint64_t bits[TILE_ROWS];
    WEIGHT room[TILE_ROWS][WORD];
    SUM sums[TILE_ROWS][TILE_BATCH][CHAINS];
    for (int r = 0; r < height; r++) {
        values[r] = (const WEIGHT *)weights->values + (row + r) * weights->kept;
        mask[r] = weights->mask + (row + r) * weights->words * 8;
        for (int b = 0; b < batch; b++)
            for (int c = 0; c < chains; c++)
                sums[r][b][c] = ZERO();
    }
    for (int64_t word = 0; word < weights->words; word++, x += batch * WORD) {
        for (int r = 0; r < height; r++) {
            bits[r] = MASK_WORD(mask[r], word);
            from[r] = readable(values[r], end, room[r], sizeof(WEIGHT));
            values[r] += __builtin_popcountll(bits[r]);
            for (size_t line = 0; line < AHEAD * sizeof(WEIGHT); line += 64)
                __builtin_prefetch((const char *)values[r] + 1024 + line);
        }
#ifdef PICKING
        if (word < weights->width / WORD) {
            for (int step = 0; step < STEPS / 2; step++) {
                VECTOR w[TILE_ROWS];
                INDEX index[TILE_ROWS];
                for (int r = 0; r < height; r++) {
                    w[r] = KEPT(from[r] + step * LANES);
                    index[r] = INDICES(bits[r] >> step * 2 * LANES % WORD);
                }
                for (int b = 0; b < batch; b++) {
                    VECTOR low = LOAD(x + b * WORD + step * 2 * LANES);
                    VECTOR high = LOAD(x + b * WORD + step * 2 * LANES + LANES);
                    for (int r = 0; r < height; r++)
                        sums[r][b][step % chains] = FMA(sums[r][b][step % chains], w[r], PICK(low, index[r], high));
                }
            }
            continue;
        }
#endif
        for (int step = 0; step < STEPS; step++) {
            VECTOR w[TILE_ROWS];
            for (int r = 0; r < height; r++)
                w[r] = WEIGHTS(from[r] + __builtin_popcountll(before(bits[r], step * LANES)), bits[r] >> step * LANES);
            for (int b = 0; b < batch; b++) {
                VECTOR channels = LOAD(x + b * WORD + step * LANES);
                for (int r = 0; r < height; r++)
                    sums[r][b][step % chains] = FMA(sums[r][b][step % chains], w[r], channels);
            }
        }
    }
    for (int r = 0; r < height; r++)
        for (int b = 0; b < batch; b++) {
            float result = 0;
            for (int c = 0; c < chains; c++)
                result += TOTAL(sums[r][b][c]);
            write_output(job, group * TILE_BATCH + b, row + r, result);
        }
}

DEAL_TILES(NAME, TILE)

#undef TILE
#undef NAME
