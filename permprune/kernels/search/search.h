/* The inner loops of the search for orders. kernels.h has them for each instruction set, on vectors of LINE numbers
 * everywhere, so that every processor finds the same bits. */
#ifndef PERMPRUNE_SEARCH_H
#define PERMPRUNE_SEARCH_H

#include "numbers.h"

enum { LARGEST_M = 64 }; /* the largest M whose members are compared with each other */

/* The mask of scores (rows, width) of which `size` columns stand in an order: position i holds column places[i], and every
 * m consecutive positions are a group of which n stay. Strides, of rows and columns, are in numbers. */
STRUCTURE(mask, {
    const float *score;
    const int64_t *places;
    uint8_t *mask; /* 1 where a weight stays, at the columns of `places`; the others are not touched */
    int64_t rows, width, size;
    int64_t score_stride[2], mask_stride[2];
    int32_t n, m;
})

/* What the weights that a mask keeps add up to, times their gradients. */
STRUCTURE(keep, {
    struct mask masking;
    const float *weight, *gradient; /* (rows, width) */
    int64_t weight_stride[2], gradient_stride[2];
    double *sums; /* (rows,) */
})

/* The weights that go when `n` of each group's members stay, for channels of which each has `rows` numbers side by
 * side. */
STRUCTURE(prune, {
    const float *score, *weight; /* (channels, rows) */
    const int64_t *groups;       /* (count, m) */
    float *pruned;               /* (channels, rows): the weight where it goes, and 0 where it stays */
    int64_t channels, rows, count;
    int32_t n, m;
})

/* What moving channels between groups costs the model of permprune/permuters/quadratic.py, for channels of which each
 * has `rows` numbers side by side. */
STRUCTURE(place, {
    const float *score, *weight, *slope, *error; /* (channels, rows) */
    const float *curvature;                      /* (channels,), damping / 2 * H_cc */
    const int64_t *groups;                       /* (count, m), the channel in each slot of a group */
    const int64_t *slots;                        /* (count,), the slot of each group that is free */
    double *cost;                                /* (count, count), to which costs are added */
    int64_t channels, rows, count;
    int32_t n, m;
})

/* A weight with zeros where a mask has none. */
STRUCTURE(apply, {
    const float *weight; /* (rows, width) */
    const uint8_t *bits; /* (rows, (width + 7) / 8), channel 0 in the highest bit of a byte: 1 where a weight is kept */
    void *masked;        /* (rows, width), F32 or BF16 */
    int64_t rows, width;
    int64_t row_stride; /* of the weight, in numbers; those of a row are side by side */
    int32_t number;     /* of `masked` */
})

#endif
