/* The functions for Python of the layers between products. */
#include "library.h"

/* See `struct activate`. */
EXPORT int32_t permprune_activate(const void *x, void *y, int64_t count, float linear, float cubic, int32_t normal,
                                  int32_t number, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    const struct activate job = {x, y, count, linear, cubic, normal, number};
    if (!kernels)
        return NO_KERNEL;
    if (count < 0 || (number != BF16 && (number != F32 || normal)) || LACKS(count, x, y))
        return BAD_SIZE;
    run_in_pieces(&job, kernels->activate, (count + ACTIVATED - 1) / ACTIVATED, 1, threads);
    return DONE;
}

/* See `struct normalize`. */
EXPORT int32_t permprune_normalize(const void *x, const void *weight, void *y, int64_t rows, int64_t width, float least,
                                   float shift, int32_t number, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    const struct normalize job = {x, weight, y, rows, width, least, shift, number};
    if (!kernels)
        return NO_KERNEL;
    if (rows < 0 || bad_size(width) || (number != F32 && number != BF16) || LACKS(rows * width, x, weight, y))
        return BAD_SIZE;
    run_in_pieces(&job, kernels->normalize, rows, 1, threads);
    return DONE;
}
