/* The function for Python of Adam. */
#include "library.h"

/* Update the kept weights and their moments. */
ENTRY(step)
{
    if (bad_size(job->rows) || bad_size(job->width) || job->kept < 0 || job->kept > job->width ||
        (job->number != F32 && job->number != BF16) ||
        LACKS(job->rows * job->kept, job->weight, job->gradient, job->bits, job->mean, job->square))
        return BAD_SIZE;
    run_in_pieces(job, kernels->step, job->rows, TILE_ROWS, threads);
    return DONE;
}
