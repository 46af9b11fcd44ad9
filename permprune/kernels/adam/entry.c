/* The function for Python of Adam. */
#include "library.h"

/* Sum the squares of the rows and of the channels. */
ENTRY(square)
{
    if (bad_size(job->rows) || bad_size(job->width) || (job->number != F32 && job->number != BF16) ||
        LACKS(job->rows * job->width, job->gradient, job->bits, job->by_row, job->by_channel))
        return BAD_SIZE;
    run_in_pieces(job, kernels->square, (job->width + SQUARED - 1) / SQUARED, 1, threads);
    return DONE;
}

/* Update the kept weights and their first moments. */
ENTRY(step)
{
    if (bad_size(job->rows) || bad_size(job->width) || job->kept < 0 || job->kept > job->width ||
        (job->number != F32 && job->number != BF16) ||
        LACKS(job->rows * job->kept, job->weight, job->gradient, job->bits, job->mean, job->by_row, job->by_channel))
        return BAD_SIZE;
    run_in_pieces(job, kernels->step, job->rows, TILE_ROWS, threads);
    return DONE;
}
