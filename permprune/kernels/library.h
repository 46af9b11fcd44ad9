/* What the functions for Python share: the kernels that run here, and threads. */
#ifndef PERMPRUNE_ENTRY_H
#define PERMPRUNE_ENTRY_H
#include "product/packed.h"

#define EXPORT __attribute__((visibility("default")))

enum status { DONE, NO_MEMORY, NO_KERNEL, BAD_ORDER, BAD_CODE, BAD_SIZE }; /* see `REASONS` in native.py */

enum { MOST = 1 << 28 }; /* the largest size of anything that is squared, or multiplied by another size */

/* Whether a size is negative or too large. */
static inline int bad_size(int64_t size) { return size < 0 || size > MOST; }

/* Whether there is work, and one of its pointers is NULL. */
#define LACKS(work, ...) lacks(work, (const void *const[]){__VA_ARGS__, (void *)1}) /* the 1 is the last */

static inline int lacks(int64_t work, const void *const *pointers)
{
    while (work && *pointers && *pointers != (void *)1)
        pointers++;
    return work && !*pointers;
}

/* Kernels number `index`, the best first; NULL if they do not run here, or do not exist. */
const struct kernels *find_kernels(int32_t index);

/* Defines `permprune_NAME(job, index, threads)`, which runs a job with kernels number `index` and returns a `status`. What
 * the job says is checked before a kernel runs: sizes, types, and places; not the memory behind its pointers. */
#define ENTRY(NAME, JOB)                                                                                               \
    static int32_t NAME(const struct JOB *job, const struct kernels *kernels, int32_t threads);                        \
    EXPORT int32_t permprune_##NAME(const struct JOB *job, int32_t index, int32_t threads)                             \
    {                                                                                                                  \
        const struct kernels *kernels = find_kernels(index);                                                           \
        return kernels ? NAME(job, kernels, threads) : NO_KERNEL;                                                      \
    }                                                                                                                  \
    static int32_t NAME(const struct JOB *job, const struct kernels *kernels, int32_t threads)

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
