/* The inner loops of the search for orders. search/kernels.h has them for each instruction set, on vectors of SIDE
 * numbers everywhere, so that every processor finds the same bits. */
#ifndef PERMPRUNE_SEARCH_H
#define PERMPRUNE_SEARCH_H

#include "product/packed.h"

enum { SIDE = 16 };      /* groups, or rows, that are worked on side by side */
enum { LARGEST_M = 64 }; /* the largest M whose members are compared with each other */

typedef float scores __attribute__((vector_size(SIDE * sizeof(float))));
typedef int32_t counts __attribute__((vector_size(SIDE * sizeof(int32_t))));

/* Scores (rows, width) of which `size` columns stand in an order: position i holds column places[i], and every m
 * consecutive positions are a group of which n stay. Strides are in numbers. The same members, in the same order, as
 * `Masking` in search.py. */
struct masking {
    const float *score;
    const int64_t *places;
    uint8_t *mask; /* 1 where a weight stays, at the columns of `places`; the others are not touched */
    int64_t rows, width, size;
    int64_t row_stride, column_stride; /* of the scores */
    int64_t mask_row_stride, mask_column_stride;
    int32_t n, m;
};

/* What the kept weights of a masking add up to, times their gradients. The same members, in the same order, as `Keeping`
 * in search.py. */
struct keeping {
    struct masking masking;
    const float *weight, *gradient; /* (rows, width) */
    int64_t weight_row_stride, weight_column_stride, gradient_row_stride, gradient_column_stride;
    double *sums; /* (rows,) */
};

/* The weights that go when `n` of each group's members stay, for channels of which each has `rows` numbers side by side.
 * The same members, in the same order, as `Pruning` in search.py. */
struct pruning {
    const float *score, *weight; /* (channels, rows) */
    const int64_t *groups;       /* (count, m) */
    float *pruned;               /* (channels, rows): the weight where it goes, and 0 where it stays */
    int64_t channels, rows, count;
    int32_t n, m;
};

/* What moving channels between groups costs the model of permprune/permuters/quadratic.py, for channels of which each
 * has `rows` numbers side by side. The same members, in the same order, as `Placement` in search.py. */
struct placement {
    const float *score, *weight, *slope, *error; /* (channels, rows) */
    const float *curvature;                      /* (channels,), damping / 2 * H_cc */
    const int64_t *groups;                       /* (count, m), the channel in each slot of a group */
    const int64_t *slots;                        /* (count,), the slot of each group that is free */
    double *cost;                                /* (count, count), zeros at first */
    int64_t channels, rows, count;
    int32_t n, m;
};

/* A weight with zeros where a mask has none. The same members, in the same order, as `Applying` in search.py. */
struct applying {
    const float *weight; /* (rows, width) */
    const uint8_t *bits; /* (rows, (width + 7) / 8), channel 0 in the highest bit of a byte: 1 where a weight is kept */
    void *masked;        /* (rows, width), F32 or BF16 */
    int64_t rows, width;
    int64_t row_stride; /* of the weight, in numbers; those of a row are side by side */
    int32_t number;     /* of `masked` */
};

/* A step of Adam for the weights that a mask keeps, in place. All numbers are F32, or all are BF16; then weights are
 * rounded stochastically, with `seed`. The same members, in the same order, as `Stepping` in adam.py. */
struct stepping {
    void *weight;         /* (rows, width) */
    const void *gradient; /* (rows, width) */
    const uint8_t *bits;  /* as in `applying`; of a row, `kept` are set */
    void *mean, *square;  /* (rows, kept), the moments of the kept weights in order of their channels */
    int64_t rows, width, kept;
    float rate, first, second, root, least; /* weight -= rate * mean / (root * sqrt(square) + least) */
    uint32_t seed;
    int32_t number;
};

struct search_kernels {
    void (*mask)(const void *masking, int64_t first, int64_t last); /* of these rows */
    void (*keep)(const void *keeping, int64_t first, int64_t last);
    void (*prune)(const void *pruning, int64_t first, int64_t last); /* of these groups */
    int (*place)(const struct placement *placement);                /* 0 when there is no memory */
    void (*apply)(const void *applying, int64_t first, int64_t last); /* of these rows */
    void (*step)(const void *stepping, int64_t first, int64_t last);  /* of these rows */
};

extern const struct search_kernels avx512_search, avx2_search, portable_search;

#endif
