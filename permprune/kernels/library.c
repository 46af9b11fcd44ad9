/* The kernels and their names, the structures that Python fills in, threads, and the check of places. */
#include "library.h"
#include <stdatomic.h>

static const struct kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &amx_kernels, &avx512_kernels, &avx2_kernels,
#elif defined(__aarch64__)
    &neon_kernels,
#endif
    &portable_kernels,
};
enum { KERNELS = sizeof all_kernels / sizeof *all_kernels };

/* What `test` returns; it is called once: in a virtual machine each look at the processor's features traps. */
static int cached(_Atomic signed char *result, int (*test)(void))
{
    if (!*result)
        *result = test() ? 1 : -1;
    return *result > 0;
}

static int runs(int32_t index)
{
    static _Atomic signed char results[KERNELS];
    if (index < 0 || index >= KERNELS)
        return 0;
    return !all_kernels[index]->runs_here || cached(&results[index], all_kernels[index]->runs_here);
}

int runs_pairs(int32_t index)
{
    static _Atomic signed char results[KERNELS];
    return all_kernels[index]->pairs && cached(&results[index], all_kernels[index]->pairs_run_here);
}

const struct kernels *find_kernels(int32_t index) { return runs(index) ? all_kernels[index] : NULL; }

/* Whether kernels number `index` multiply pairs of bf16 numbers: then dense products of bf16 have twice the speed. */
EXPORT int32_t permprune_runs_pairs(int32_t index) { return runs(index) && runs_pairs(index); }

/* The name of kernels number `index`, the best first; "" if they do not run here, NULL after the last. */
EXPORT const char *permprune_kernels(int32_t index)
{
    if (index < 0 || index >= KERNELS)
        return NULL;
    return runs(index) ? all_kernels[index]->name : "";
}

/* The declaration of structure number `index`, those in it first; NULL after the last. */
EXPORT const char *permprune_structure(int32_t index)
{
    static const char *const texts[] = {weights_text, compress_text, mask_text,   keep_text,          prune_text,      place_text,
                                        apply_text,   square_text,   step_text,   states_text, attend_text,     attend_many_text, unpack_states_text};
    return index >= 0 && index < (int32_t)(sizeof texts / sizeof *texts) ? texts[index] : NULL;
}

/* The digest of the sources from which the library was built (hatch_build.py). */
EXPORT const char *permprune_sources(void) { return PERMPRUNE_SOURCES; }

/* ---- threads: those of the OpenMP runtime that torch has loaded; a second pool would compete for the cores ---- */

typedef void parallel_region(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_region *parallel;

struct pieces {
    const void *job;
    kernel *function;
    int64_t count, piece;
    _Atomic int64_t next;
};

static void take_pieces(void *data)
{
    struct pieces *pieces = data;
    for (;;) {
        int64_t first = atomic_fetch_add(&pieces->next, pieces->piece);
        if (first >= pieces->count)
            return;
        pieces->function(pieces->job, first, smaller(first + pieces->piece, pieces->count));
    }
}

void run_in_pieces(const void *job, kernel *function, int64_t count, int64_t unit, int32_t threads)
{
    if (threads <= 1 || !parallel || count <= unit) {
        function(job, 0, count);
        return;
    }
    int64_t piece = count / (threads * 4) / unit * unit;
    struct pieces pieces = {job, function, count, piece < unit ? unit : piece, 0};
    parallel(take_pieces, &pieces, (unsigned)threads, 0);
}

EXPORT void permprune_use_threads_of(void *gomp_parallel) { parallel = (parallel_region *)gomp_parallel; }

int places_are_bad(const int64_t *places, int64_t count, int64_t limit)
{
    uint64_t bad = 0;
    if (LACKS(count, places) || limit < 0)
        return 1;
    for (int64_t i = 0; i < count; i++)
        bad |= (uint64_t)places[i] >= (uint64_t)limit;
    return bad != 0;
}
