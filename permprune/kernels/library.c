/* The kernels and their names, threads, and the check of places. */
#include "library.h"
#include <stdatomic.h>

static const struct kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &avx512_kernels, &avx2_kernels,
#elif defined(__aarch64__)
    &neon_kernels,
#endif
    &portable_kernels,
};
enum { KERNELS = sizeof all_kernels / sizeof *all_kernels };

/* Whether kernels run here. The answer is kept: in a virtual machine each look at the processor's features traps. */
static int answer(_Atomic signed char *kept, int (*question)(void))
{
    signed char found = *kept;
    if (!found)
        *kept = found = question() ? 1 : -1;
    return found > 0;
}

static int runs(int32_t index)
{
    static _Atomic signed char kept[KERNELS];
    return index >= 0 && index < KERNELS && answer(&kept[index], all_kernels[index]->runs_here);
}

int runs_pairs(int32_t index)
{
    static _Atomic signed char kept[KERNELS];
    return all_kernels[index]->pairs && answer(&kept[index], all_kernels[index]->pairs_run_here);
}

const struct kernels *find_kernels(int32_t index) { return runs(index) ? all_kernels[index] : NULL; }

/* The name of kernels number `index`, the best first; "" if they do not run here, NULL after the last. */
EXPORT const char *permprune_kernels(int32_t index)
{
    if (index < 0 || index >= KERNELS)
        return NULL;
    return runs(index) ? all_kernels[index]->name : "";
}

/* ---- threads: those of the OpenMP runtime that torch has loaded; a second pool would compete for the cores ---- */

typedef void parallel_region(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_region *parallel;

struct pieces {
    const void *job;
    piece_kernel *kernel;
    int64_t last, piece;
    _Atomic int64_t next;
};

static void take_pieces(void *data)
{
    struct pieces *pieces = data;
    for (;;) {
        int64_t first = atomic_fetch_add(&pieces->next, pieces->piece);
        if (first >= pieces->last)
            return;
        int64_t stop = first + pieces->piece;
        pieces->kernel(pieces->job, first, stop < pieces->last ? stop : pieces->last);
    }
}

void deal(const void *job, piece_kernel *kernel, int64_t count, int64_t unit, int32_t threads)
{
    if (threads <= 1 || !parallel) {
        kernel(job, 0, count);
        return;
    }
    int64_t piece = count / (threads * 4) / unit * unit;
    struct pieces pieces = {job, kernel, count, piece < unit ? unit : piece, 0};
    parallel(take_pieces, &pieces, (unsigned)threads, 0);
}

void deal_rows(const void *job, piece_kernel *kernel, int64_t count, int32_t threads)
{
    deal(job, kernel, count, TILE_ROWS, threads);
}

EXPORT void permprune_use_threads_of(void *gomp_parallel) { parallel = (parallel_region *)gomp_parallel; }

int places_are_bad(const int64_t *places, int64_t count, int64_t limit)
{
    uint64_t bad = 0;
    if (LACKS(count, places))
        return 1;
    for (int64_t i = 0; i < count; i++)
        bad |= (uint64_t)places[i] >= (uint64_t)limit;
    return bad != 0;
}
