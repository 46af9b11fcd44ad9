/* Layers between products, whose numbers are F32 or BF16: arithmetic is in fp32, and results are rounded once. */
#ifndef PERMPRUNE_ELEMENTWISE_H
#define PERMPRUNE_ELEMENTWISE_H

#include "numbers.h"

enum { ACTIVATED = 1024 }; /* numbers of a block */

/* y = x / (1 + exp(-x (linear + cubic x^2))), or, if it is `normal`, x times the normal distribution function of x, of BF16. */
struct activate {
    const void *x; /* (count,) */
    void *y;
    int64_t count;
    float linear, cubic;
    int32_t normal, number;
};

/* y = x / sqrt(mean of the squares of a row of x + least) * (weight + shift) */
struct normalize {
    const void *x;      /* (rows, width) */
    const void *weight; /* (width,) */
    void *y;
    int64_t rows, width;
    float least, shift;
    int32_t number;
};

#endif
