/* A step of Adam for the weights that a mask keeps, in place. */
#ifndef PERMPRUNE_ADAM_H
#define PERMPRUNE_ADAM_H

#include "numbers.h"

/* All numbers are F32, or all are BF16; then weights are rounded stochastically, with `seed`. */
STRUCTURE(step, {
    void *weight;         /* (rows, width) */
    const void *gradient; /* (rows, width) */
    const uint8_t *bits;  /* (rows, (width + 7) / 8), as in `apply` of search.h; of a row, `kept` are set */
    void *mean, *square;  /* (rows, kept), the moments of the kept weights in order of their channels */
    int64_t rows, width, kept;
    float rate, first, second, root, least; /* weight -= rate * mean / (root * sqrt(square) + least) */
    uint32_t seed;
    int32_t number;
})

#endif
