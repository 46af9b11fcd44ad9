/* The functions for Python of the pruned cache: attention, and unpacking of states. */
#include "library.h"

/* Whether `states` contradict themselves, or have fewer than `tokens` tokens. */
static int states_are_bad(const struct states *states, int64_t tokens)
{
    const int64_t width = states->width, kept = states->kept;
    const int kind = states->kind, number = states->number, recovers = kind != EVERY && states->amplitude;
    const int64_t signed_channels = recovers ? width - kept : 0;
    if (width < 1 || width > WIDEST || kept < 1 || kept > width || kind < EVERY || kind > BITS || number < F32 ||
        number > CODED + MOST_BITS - 2 || (is_coded(number) && kind != EVERY))
        return 1;
    return states->tokens < tokens || (kind == EVERY ? kept != width : states->code_bytes < (width + 7) / 8) ||
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
