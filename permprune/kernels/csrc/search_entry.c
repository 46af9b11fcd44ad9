/* The functions for Python of the search: the inner loops of masks, swaps, placement and training. */
#include "entry.h"
#include "search.h"

static int masking_is_bad(const struct masking *masking)
{
    const int m = masking->m;
    return m < 1 || m > LARGEST_M || masking->size % m || places_are_bad(masking->places, masking->size, masking->width);
}

/* Write the mask of some columns in their order. Returns a `status`. */
EXPORT int32_t permprune_mask(const struct masking *masking, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    if (masking_is_bad(masking))
        return BAD_ORDER;
    deal_rows(masking, kernels->search->mask, masking->rows, threads);
    return DONE;
}

/* Add up, by row, the kept weights times their gradients. Returns a `status`. */
EXPORT int32_t permprune_keep(const struct keeping *keeping, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    if (masking_is_bad(&keeping->masking))
        return BAD_ORDER;
    deal_rows(keeping, kernels->search->keep, keeping->masking.rows, threads);
    return DONE;
}

/* Write the pruned weights of all groups. Returns a `status`. */
EXPORT int32_t permprune_prune(const struct pruning *pruning, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    const int64_t count = pruning->count, m = pruning->m;
    if (m < 2 || m > LARGEST_M || pruning->n < 1 || pruning->n >= m ||
        places_are_bad(pruning->groups, count * m, pruning->channels))
        return BAD_ORDER;
    deal_rows(pruning, kernels->search->prune, count, threads);
    return DONE;
}

/* Add to `cost` what it costs to move the free channel of each group to each group. Returns a `status`. */
EXPORT int32_t permprune_place(const struct placement *placement, int32_t index)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    const int64_t count = placement->count, m = placement->m;
    if (m < 2 || m > LARGEST_M || placement->n < 1 || placement->n >= m ||
        places_are_bad(placement->slots, count, m) ||
        places_are_bad(placement->groups, count * m, placement->channels))
        return BAD_ORDER;
    return kernels->search->place(placement) ? DONE : NO_MEMORY;
}

/* Write a weight with zeros where a mask has none. Returns a `status`. */
EXPORT int32_t permprune_apply(const struct applying *applying, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    deal_rows(applying, kernels->search->apply, applying->rows, threads);
    return DONE;
}

/* Update the kept weights and their moments. Returns a `status`. */
EXPORT int32_t permprune_step(const struct stepping *stepping, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    deal_rows(stepping, kernels->search->step, stepping->rows, threads);
    return DONE;
}
