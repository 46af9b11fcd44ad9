/* The check of the codes of packed weights. */
#include "library.h"

/* Whether the mask of the channels of some blocks keeps exactly n of every m of the first `width`, and no others. */
static int keeps_pattern(const struct weights *weights, const char *block, int32_t n, int32_t m)
{
    const int64_t size = block_bytes(weights);
    uint32_t bad = 0;
    uint64_t waiting = 0; /* the mask of `count` channels that are read but not yet counted */
    int count = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < weights->count * CODE; i++) {
        int64_t left = weights->width - i / CODE * BLOCK;
        uint64_t mask = kept_channels(read_code(block + i / CODE * size), weights->kind);
        if (weights->kind == POSITIONS && left < BLOCK)
            mask = before(mask, (int)left); /* the groups after the width keep two channels each, of zeros */
        waiting |= (mask >> i % CODE * 8 & 255) << count;
        for (count += 8; count >= m && counted < weights->width; count -= m, counted += m, waiting >>= m)
            bad |= __builtin_popcountll(before(waiting, m)) != n;
        if (counted == weights->width) {
            bad |= waiting != 0;
            waiting = 0;
            count = 0;
        }
    }
    return !bad;
}

/* Whether the positions of every group ascend, except in those of I4, and are 0 and 1 after the width. */
static int positions_ascend(const struct weights *weights, const char *block)
{
    const int64_t size = block_bytes(weights);
    int bad = 0;
    for (int64_t group = 0; group < weights->count * (BLOCK / 4); group++) {
        int pair = (int)(read_code(block + group / (BLOCK / 4) * size) >> group % (BLOCK / 4) * 4 & 15);
        bad |= (weights->number != I4 && (pair & 3) >= pair >> 2) || (group * 4 >= weights->width && pair != 4);
    }
    return !bad;
}

/* The first row whose codes do not keep exactly n of every m channels, 0 if m does not fit the weight; -1 if there is none. */
EXPORT int64_t permprune_check(const struct weights *weights, int32_t n, int32_t m)
{
    if (weights_are_bad(weights) || weights->kind == PLAIN || m < 1 || m > BLOCK / 4 || weights->width % m)
        return 0;
    const char *block = weights->blocks;
    for (int64_t row = 0; row < weights->rows; row++, block += weights->count * block_bytes(weights))
        if (!keeps_pattern(weights, block, n, m) || (weights->kind == POSITIONS && !positions_ascend(weights, block)))
            return row;
    return -1;
}
