/* The functions for Python of the pruned cache: attention, packing and unpacking of states. */
#include "library.h"

/* Whether `states` contradict themselves, or have fewer than `tokens` tokens. */
static int states_are_bad(const struct states *states, int64_t tokens)
{
    const int64_t width = states->width, kept = states->kept, planes = (width / 4 + 7) / 8;
    const int64_t code_bytes[] = {0, (width + 7) / 8, 2 * planes, 3 * planes, 2 * planes};
    const int kind = states->kind, number = states->number, recovers = kind != EVERY && states->amplitude;
    const int64_t signed_channels = number == I5 ? width : recovers ? width - kept : 0;
    if (width < 1 || width > WIDEST || kept < 1 || kept > width || kind < EVERY || kind > THREE_OF_4 || number < F32 ||
        number > I5)
        return 1;
    if (kind == EVERY ? kept != width : kind != BITS && (width % 4 || kept != width / 4 * (kind - ONE_OF_4 + 1)))
        return 1;
    return states->tokens < tokens || states->code_bytes < code_bytes[kind] ||
           states->sign_bytes < (signed_channels + 7) / 8 || LACKS(states->tokens, states->values) ||
           (kind != EVERY && LACKS(states->tokens, states->code)) ||
           (has_scale(number) && LACKS(states->tokens, states->scale)) ||
           (signed_channels && LACKS(states->tokens, states->signs)) || (recovers && !states->level);
}

/* The output of attention, (batch, count, heads * group, width). */
ENTRY(attend)
{
    struct attend own = *job;
    const int64_t heads = own.batch * own.heads, whole = own.length - own.packed_tokens;
    int32_t bad = 0;
    own.bad = &bad;
    if (bad_size(own.batch) || bad_size(own.heads) || bad_size(heads) || bad_size(own.group) || bad_size(own.count) ||
        bad_size(own.length) || bad_size(own.packed_tokens) || own.before < 0 || own.before > whole ||
        own.parts != (own.length + PART_TOKENS - 1) / PART_TOKENS || !is_float(own.number) ||
        LACKS(heads * own.group * own.count, own.query, own.output) ||
        LACKS(heads * own.group * own.count * own.parts, own.partial))
        return BAD_SIZE;
    for (int side = 0; side < 2; side++) {
        const int64_t width = own.packed[side].width;
        if (own.whole[side].width != width || states_are_bad(&own.packed[side], heads * own.packed_tokens) ||
            states_are_bad(&own.whole[side], heads * whole))
            return BAD_SIZE;
        for (int64_t head = 0; head < own.heads; head++)
            if (places_are_bad(own.order[side] + head * width, width, width))
                return BAD_ORDER;
    }
    run_in_pieces(&own, kernels->attend, heads * own.parts, 1, threads);
    run_in_pieces(&own, kernels->combine, heads, 1, 1);
    return bad ? BAD_CODE : DONE;
}

/* Some packed tokens as numbers, (batch * heads, count, width). */
ENTRY(unpack_states)
{
    struct unpack_states own = *job;
    const int64_t heads = own.batch * own.heads;
    int32_t bad = 0;
    own.bad = &bad;
    if (bad_size(own.batch) || bad_size(own.heads) || bad_size(heads) || bad_size(own.first) || bad_size(own.count) ||
        !is_float(own.number) || states_are_bad(&own.states, heads * (own.first + own.count)) ||
        LACKS(heads * own.count, own.output))
        return BAD_SIZE;
    run_in_pieces(&own, kernels->unpack_states, heads, 1, threads);
    return bad ? BAD_CODE : DONE;
}

/* Pack states. */
ENTRY(pack_states)
{
    const struct states *states = &job->states;
    const int64_t n = job->n, m = job->m, heads = job->batch * job->heads;
    if (bad_size(job->batch) || bad_size(job->heads) || bad_size(heads) || bad_size(job->count) ||
        !is_float(job->number) || states_are_bad(states, heads * job->count) || states->kind == EVERY || n < 1 ||
        n >= m || states->width % m || states->kept != states->width / m * n || (states->kind != BITS && m != 4) ||
        LACKS(heads * job->count, job->numbers, job->weight, states->level))
        return BAD_SIZE;
    run_in_pieces(job, kernels->pack_states, heads, 1, threads);
    return DONE;
}
