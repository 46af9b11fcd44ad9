/* What the functions for Python share: the kernels that run here, and threads. */
#ifndef PERMPRUNE_ENTRY_H
#define PERMPRUNE_ENTRY_H
#include "packed.h"

#define EXPORT __attribute__((visibility("default")))

enum status { DONE, NO_MEMORY, NO_KERNEL, BAD_ORDER, BAD_CODE };

/* Kernels number `index`, the best first; NULL if they do not run here, or do not exist. */
const struct kernels *find_kernels(int32_t index);

/* Whether products of pairs of bf16 numbers run here. */
int runs_pairs(int32_t index);

typedef void piece_kernel(const void *job, int64_t first, int64_t last);

/* Runs `kernel` on `count` items, in pieces of whole units, such as the rows of a tile: the result does not depend on
 * the threads. */
void deal(const void *job, piece_kernel *kernel, int64_t count, int64_t unit, int32_t threads);

/* The same for rows. */
void deal_rows(const void *job, piece_kernel *kernel, int64_t count, int32_t threads);

/* Whether some places are outside of [0, limit). */
int places_are_bad(const int64_t *places, int64_t count, int64_t limit);

#endif
