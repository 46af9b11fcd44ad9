/* The functions for Python of the search: masks, sums over kept weights, and the costs of moving channels. */
#include "library.h"

static int pattern_is_bad(int32_t n, int32_t m) { return m < 2 || m > LARGEST_M || n < 1 || n >= m; }

static int32_t check_mask(const struct mask *job)
{
    if (pattern_is_bad(job->n, job->m) || bad_size(job->rows) || bad_size(job->size) || job->size % job->m ||
        LACKS(job->rows * job->size, job->score))
        return BAD_SIZE;
    return places_are_bad(job->places, job->size, job->width) ? BAD_ORDER : DONE;
}

/* Write the mask of some columns in their order. */
ENTRY(mask)
{
    const int32_t status = LACKS(job->rows * job->size, job->mask) ? BAD_SIZE : check_mask(job);
    if (status == DONE)
        run_in_pieces(job, kernels->mask, job->rows, TILE_ROWS, threads);
    return status;
}

/* Add up, by row, the kept weights times their gradients. */
ENTRY(keep)
{
    const int missing = LACKS(job->masking.rows, job->weight, job->gradient, job->sums);
    const int32_t status = missing ? BAD_SIZE : check_mask(&job->masking);
    if (status == DONE)
        run_in_pieces(job, kernels->keep, job->masking.rows, TILE_ROWS, threads);
    return status;
}

/* Write the pruned weights of all groups. */
ENTRY(prune)
{
    if (pattern_is_bad(job->n, job->m) || bad_size(job->rows) || bad_size(job->count) ||
        LACKS(job->rows * job->count, job->score, job->weight, job->pruned))
        return BAD_SIZE;
    if (places_are_bad(job->groups, job->count * job->m, job->channels))
        return BAD_ORDER;
    run_in_pieces(job, kernels->prune, job->count, TILE_ROWS, threads);
    return DONE;
}

/* Add to `cost` what it costs to move the free channel of each group to each group. */
ENTRY(place)
{
    (void)threads;
    if (pattern_is_bad(job->n, job->m) || bad_size(job->rows) || bad_size(job->count) || LACKS(job->count, job->cost) ||
        LACKS(job->rows * job->count, job->score, job->weight, job->slope, job->error, job->curvature))
        return BAD_SIZE;
    if (places_are_bad(job->slots, job->count, job->m) ||
        places_are_bad(job->groups, job->count * job->m, job->channels))
        return BAD_ORDER;
    return !job->count || kernels->place(job) ? DONE : NO_MEMORY;
}

/* Write a weight with zeros where a mask has none. */
ENTRY(apply)
{
    if (bad_size(job->rows) || bad_size(job->width) || (job->number != F32 && job->number != BF16) ||
        LACKS(job->rows * job->width, job->weight, job->bits, job->masked))
        return BAD_SIZE;
    run_in_pieces(job, kernels->apply, job->rows, TILE_ROWS, threads);
    return DONE;
}
