/* Blocks of masked weights: the code of what a mask keeps, and the values. */
#include "library.h"

static uint64_t reversed(uint8_t byte) { return (byte * 0x0202020202ull & 0x010884422010ull) % 1023; }

static void compress_rows(const void *argument, int64_t first, int64_t last)
{
    const struct compress *job = argument;
    const int64_t count = (job->width + BLOCK - 1) / BLOCK, size = CODE + BLOCK * (int64_t)sizeof(float);
    for (int64_t row = first; row < last; row++)
        for (int64_t n = 0; n < count; n++) {
            const float *weight = (const float *)job->weight + row * job->row_stride + n * BLOCK;
            const uint8_t *bits = job->bits + row * ((job->width + 7) / 8) + n * BLOCK / 8;
            const int used = (int)smaller(BLOCK, job->width - n * BLOCK);
            char *block = job->blocks + (row * count + n) * size;
            float *to = (float *)(block + CODE);
            uint64_t code = 0;
            for (int byte = 0; byte * 8 < used; byte++)
                code |= reversed(bits[byte]) << byte * 8;
            code = used < BLOCK ? before(code, used) : code;
            memcpy(block, &code, sizeof code);
            for (int c = 0, kept = 0; c < used; c++) { /* no branch: what is not kept is overwritten */
                to[kept] = weight[c];
                kept += (int)(code >> c & 1);
            }
        }
}

/* What a row keeps of four columns: the code of two, and 0 of more or fewer. `kept` is one byte for each column. */
static ALWAYS_INLINE uint64_t positions_of(const uint8_t *kept, const int32_t *columns)
{
    static const uint8_t positions[16] = {[3] = 4, [5] = 8, [9] = 12, [6] = 9, [10] = 13, [12] = 14};
    return positions[kept[columns[0]] | kept[columns[1]] << 1 | kept[columns[2]] << 2 | kept[columns[3]] << 3];
}

/* The same for pairs of bf16. `scratch` has room for the columns, and for a row of bytes and one of numbers. */
static void compress_pairs_of(const struct compress *job, int64_t first, int64_t last, int32_t *scratch)
{
    const int64_t width = job->width, count = (width + BLOCK - 1) / BLOCK, padded = count * BLOCK;
    const int64_t size = CODE + BLOCK / 2 * (int64_t)sizeof(uint16_t);
    int32_t *columns = scratch;
    uint16_t *line = (uint16_t *)(columns + padded);
    uint8_t *kept = (uint8_t *)(line + padded);
    memset(line, 0, (size_t)padded * 3);
    for (int64_t c = 0; c < padded; c++)
        columns[c] = (int32_t)(c < width ? job->order[c] : c);
    for (int64_t c = width; c < padded; c++)
        kept[c] = c % 4 < 2; /* after the width */
    for (int64_t row = first; row < last; row++) {
        const uint8_t *bits = job->bits + row * ((width + 7) / 8);
        char *block = job->blocks + row * count * size;
        for (int64_t byte = 0; byte < width / 8; byte++) {
            const uint64_t eight = bits[byte] * 0x8040201008040201ull >> 7 & 0x0101010101010101; /* a byte for each bit */
            memcpy(kept + byte * 8, &eight, sizeof eight);
        }
        for (int64_t c = width / 8 * 8; c < width; c++)
            kept[c] = bits[c >> 3] >> (7 - (c & 7)) & 1;
        if (job->number == F32)
            for (int64_t c = 0; c < width; c++)
                line[c] = f32_to_bf16(((const float *)job->weight)[row * job->row_stride + c]);
        else
            memcpy(line, (const uint16_t *)job->weight + row * job->row_stride, (size_t)width * sizeof *line);
        for (int64_t n = 0; n < count; n++, block += size) {
            uint64_t code = 0;
            for (int group = 0; group < BLOCK / 4; group++) {
                const int32_t *four = columns + n * BLOCK + group * 4;
                const uint64_t two = positions_of(kept, four);
                const uint16_t pair[2] = {line[four[two & 3]], line[four[two >> 2]]};
                memcpy(block + CODE + group * 4, pair, sizeof pair);
                code |= two << group * 4;
            }
            memcpy(block, &code, sizeof code);
        }
    }
}

static void compress_pairs(const void *argument, int64_t first, int64_t last)
{
    const struct compress *job = argument;
    const int64_t padded = (job->width + BLOCK - 1) / BLOCK * BLOCK;
    int32_t *scratch = malloc((size_t)padded * 7);
    if (scratch)
        compress_pairs_of(job, first, last, scratch);
    else /* codes of 0, which are an error */
        memset(job->blocks + first * padded / BLOCK * (CODE + BLOCK), 0, (size_t)((last - first) * padded / BLOCK * (CODE + BLOCK)));
    free(scratch);
}

/* Whether some group has the code 0. */
static int lacks_pairs(const struct compress *job)
{
    const int64_t blocks = job->rows * ((job->width + BLOCK - 1) / BLOCK), size = CODE + BLOCK / 2 * (int64_t)sizeof(uint16_t);
    uint64_t zeros = 0;
    for (int64_t n = 0; n < blocks; n++) {
        const uint64_t code = read_code(job->blocks + n * size);
        zeros |= (code - 0x1111111111111111) & ~code & 0x8888888888888888;
    }
    return zeros != 0;
}

/* Write the blocks of a weight and its mask. */
ENTRY(compress)
{
    (void)kernels;
    const int pairs = job->order != NULL, types = job->number == F32 || (pairs && job->number == BF16);
    if (bad_size(job->rows) || bad_size(job->width) || !types || (pairs && job->width % 4) ||
        LACKS(job->rows * job->width, job->weight, job->bits, job->blocks))
        return BAD_SIZE;
    if (pairs && places_are_bad(job->order, job->width, job->width))
        return BAD_ORDER;
    run_in_pieces(job, pairs ? compress_pairs : compress_rows, job->rows, TILE_ROWS, threads);
    return pairs && lacks_pairs(job) ? BAD_CODE : DONE;
}
