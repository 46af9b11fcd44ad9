/* y = x W^T in integers, with a scale for each block of the weight and of the activations; family_i8.h includes this file
 * for each way of reading the weight. Sums of integers are exact, so that all processors get the same.
 *
 * Expects NAME; SCALE_OF(const struct weights *, const char *block, int64_t place), the scale of block number `place`;
 * READ(const struct weights *, const char *block, const char *end, int8_t *room), its FACTORS; and DOT, SUM, ZERO, SCALE
 * and TOTAL (family_i8.h). SCALE_TYPE is that of a scale, by default float; ADD(SUM, w, x, w_scale, x_scale) adds the
 * product of a block, by default SCALE of its DOT.
 */
#ifndef SCALE_TYPE
#define SCALE_TYPE float
#endif
#ifndef ADD
#define ADD(sum, w, x, w_scale, x_scale) SCALE(sum, DOT(w, x), w_scale, x_scale)
#endif
#define TILE PASTE(NAME, _tile)

static ALWAYS_INLINE void TILE(const struct product *job, int64_t row, int64_t apart, int64_t group, const int height,
                               const int batch)
{
    const struct weights *weights = job->weights;
    const int64_t size = block_bytes(weights), count = weights->count;
    const char *end = weights->blocks + weights->rows * count * size;
    const int8_t *x = (const int8_t *)job->staged->values + group * TILE_BATCH * count * BLOCK;
    const float *x_scale = job->staged->scale + group * TILE_BATCH * count;
    const char *block[TILE_ROWS];
    int8_t room[TILE_ROWS][BLOCK];
    SUM sums[TILE_ROWS][TILE_BATCH];
    UNROLLED for (int r = 0; r < height; r++) {
        block[r] = weights->blocks + (row + r * apart) * count * size;
        UNROLLED for (int b = 0; b < batch; b++)
            sums[r][b] = ZERO();
    }
    const char *const tile = block[0];
    for (int64_t n = 0; n < count; n++, x += batch * BLOCK, x_scale += batch) {
        FACTORS w[TILE_ROWS];
        SCALE_TYPE scale[TILE_ROWS];
        fetch_ahead(job, tile, apart * count * size, size, height, TILE_BATCH, group, n);
        UNROLLED for (int r = 0; r < height; r++) {
            w[r] = READ(weights, block[r], end, room[r]);
            scale[r] = SCALE_OF(weights, block[r], (row + r * apart) * count + n);
            block[r] += size;
        }
        UNROLLED for (int b = 0; b < batch; b++) {
            VECTOR channels = LOAD(x + b * BLOCK);
            UNROLLED for (int r = 0; r < height; r++)
                sums[r][b] = ADD(sums[r][b], w[r], channels, scale[r], x_scale[b]);
        }
    }
    UNROLLED for (int r = 0; r < height; r++)
        UNROLLED for (int b = 0; b < batch; b++)
            write_output(job, group * TILE_BATCH + b, row + r * apart, TOTAL(sums[r][b]));
}

DEFINE_TILED(NAME, TILE, 2) /* two rows share what is read of the activations */

#undef TILE
#undef NAME
#undef SCALE_OF
#undef SCALE_TYPE
#undef ADD
#undef FACTORS
#undef READ
