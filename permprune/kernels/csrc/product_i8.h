/* y = x W^T in integers, with a scale for each block of a row and for each word of the activations. family_i8.h
 * includes it for each way of reading the weight. Sums of integers are exact, so that all processors get the same. */
#define TILE PASTE(NAME, _tile)

static ALWAYS_INLINE void TILE(const struct job *job, int64_t row, int64_t group, const int height, const int batch)
{
    const struct weights *weights = job->weights;
    const int64_t blocks = (weights->words + weights->block - 1) / weights->block;
    const int8_t *end = (const int8_t *)weights->values + weights->rows * weights->kept;
    const int8_t *x = (const int8_t *)job->staged->values + group * TILE_BATCH * weights->words * WORD;
    const float *x_scale = job->staged->scale + group * TILE_BATCH * weights->words;
    const int32_t *shift = job->staged->shift + group * TILE_BATCH * weights->words;
    const int8_t *values[TILE_ROWS];
    const uint8_t *mask[TILE_ROWS];
    const float *scale[TILE_ROWS];
    int8_t room[WORD];
    SUM sums[TILE_ROWS][TILE_BATCH];
    for (int r = 0; r < height; r++) {
        values[r] = (const int8_t *)weights->values + (row + r) * weights->kept;
        mask[r] = weights->mask + (row + r) * weights->words * 8;
        scale[r] = weights->scale + (row + r) * blocks;
        for (int b = 0; b < batch; b++)
            sums[r][b] = ZERO();
    }
    for (int64_t word = 0; word < weights->words; word++) {
        VECTOR w[TILE_ROWS];
        float step[TILE_ROWS];
        for (int r = 0; r < height; r++) {
            uint64_t bits = MASK_WORD(mask[r], word);
            w[r] = WEIGHTS((const int8_t *)readable(values[r], end, room, 1), bits);
            values[r] += __builtin_popcountll(bits);
            __builtin_prefetch((const char *)values[r] + 1024);
            step[r] = scale[r][weights->block == 1 ? word : word / weights->block];
        }
        for (int b = 0; b < batch; b++, x += WORD, x_scale++, shift++) {
            VECTOR channels = LOAD(x);
            for (int r = 0; r < height; r++)
                sums[r][b] = SCALE(sums[r][b], DOT(*shift, w[r], channels), step[r] * *x_scale);
        }
    }
    for (int r = 0; r < height; r++)
        for (int b = 0; b < batch; b++)
            write_output(job, group * TILE_BATCH + b, row + r, TOTAL(sums[r][b]));
}

DEAL_TILES(NAME, TILE)

#undef TILE
#undef NAME
