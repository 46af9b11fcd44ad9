/* A step of Adam with factored second moments for the weights that a mask keeps, in place. */
#ifndef PERMPRUNE_ADAM_H
#define PERMPRUNE_ADAM_H

#include "numbers.h"

/* The sums of the squares of what a mask keeps of a gradient, of F32 or BF16 numbers. */
STRUCTURE(square, {
    const void *gradient;        /* (rows, width) */
    const uint8_t *bits;         /* (rows, (width + 7) / 8), as in `apply` of search.h */
    float *by_row, *by_channel;  /* (blocks, rows), of each block of SQUARED channels; (width,) */
    int64_t rows, width;
    int32_t number;
})

enum { SQUARED = 256 };

/* All numbers are F32, or all are BF16; then weights are rounded stochastically, with `seed`. */
STRUCTURE(step, {
    void *weight;         /* (rows, width) */
    const void *gradient; /* (rows, width) */
    const uint8_t *bits;  /* (rows, (width + 7) / 8), as in `apply` of search.h; of a row, `kept` are set */
    void *mean;           /* (rows, kept), the first moments of the kept weights in order of their channels */
    const float *by_row, *by_channel; /* (rows,) and (width,), the factors of the roots of the second moments */
    int64_t rows, width, kept;
    float rate, first, least; /* weight -= rate * mean / (by_row * by_channel + least) */
    uint32_t seed;
    int32_t number;
})

#endif
