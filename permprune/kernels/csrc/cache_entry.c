/* The functions for Python of the pruned cache: attention, packing and unpacking of states. */
#include "cache.h"
#include "entry.h"

static int states_are_bad(const struct states *states)
{
    return states->width < 1 || states->width > WIDEST || states->kept < 0 || states->kept > states->width ||
           (states->kind == EVERY && states->kept != states->width);
}

/* The output of attention, (batch, count, heads * group, width). Returns a `status`. */
EXPORT int32_t permprune_attend(const struct attention *attention, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    struct attention job = *attention;
    int32_t bad = 0;
    job.bad = &bad;
    for (int side = 0; side < 2; side++) {
        const int64_t width = job.packed[side].width;
        if (states_are_bad(&job.packed[side]) || states_are_bad(&job.whole[side]))
            return BAD_CODE;
        for (int64_t head = 0; head < job.heads; head++)
            if (places_are_bad(job.order[side] + head * width, width, width))
                return BAD_ORDER;
    }
    deal(&job, kernels->cache->attend, job.batch * job.heads * job.parts, 1, threads);
    deal(&job, kernels->cache->combine, job.batch * job.heads, 1, 1);
    return bad ? BAD_CODE : DONE;
}

/* Some packed tokens as numbers, (batch * heads, count, width). Returns a `status`. */
EXPORT int32_t permprune_unpack_states(const struct unpacking *unpacking, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    struct unpacking job = *unpacking;
    int32_t bad = 0;
    job.bad = &bad;
    if (states_are_bad(&job.states))
        return BAD_CODE;
    deal(&job, kernels->cache->unpack, job.batch * job.heads, 1, threads);
    return bad ? BAD_CODE : DONE;
}

/* Pack states. Returns a `status`. */
EXPORT int32_t permprune_pack_states(const struct packing *packing, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    const struct states *states = &packing->states;
    const int64_t n = packing->n, m = packing->m;
    if (states_are_bad(states) || states->kind == EVERY || n < 1 || n >= m || states->width % m ||
        states->kept != states->width / m * n || (states->kind != BITS && (m != 4 || n != states->kind - ONE_OF_4 + 1)))
        return BAD_CODE;
    deal(packing, kernels->cache->pack, packing->batch * packing->heads, 1, threads);
    return DONE;
}
