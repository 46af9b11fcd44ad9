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
    struct attend copy = *job;
    const int64_t heads = copy.batch * copy.heads, whole = copy.length - copy.packed_tokens;
    int32_t bad = 0;
    copy.bad = &bad;
    if (bad_size(copy.batch) || bad_size(copy.heads) || bad_size(heads) || bad_size(copy.group) ||
        bad_size(heads * copy.group) || bad_size(copy.count) || bad_size(copy.length) || bad_size(copy.packed_tokens) || copy.before < 0 || copy.before > whole ||
        copy.parts != (copy.length + PART_TOKENS - 1) / PART_TOKENS || !is_float(copy.number) ||
        LACKS(heads * copy.group * copy.count, copy.query, copy.output) ||
        (copy.parts && LACKS(heads * copy.group * copy.count, copy.partial)))
        return BAD_SIZE;
    for (int side = 0; side < 2; side++) {
        const struct states *packed = &copy.packed[side];
        const int64_t width = copy.whole[side].width;
        if (states_are_bad(&copy.whole[side], heads * whole) ||
            (copy.packed_tokens && (packed->width != width || states_are_bad(packed, heads * copy.packed_tokens))))
            return BAD_SIZE;
        for (int64_t head = 0; copy.order[side] && head < copy.heads; head++)
            if (places_are_bad(copy.order[side] + head * width, width, width))
                return BAD_ORDER;
    }
    run_in_pieces(&copy, kernels->attend, heads * copy.parts, 1, threads);
    run_in_pieces(&copy, kernels->combine, heads, 1, 1);
    return bad ? BAD_CODE : DONE;
}

/* The same for many queries in bf16 and whole tokens, where there are matrix units. */
ENTRY(attend_many)
{
    struct attend_many copy = *job;
    const int64_t heads = copy.heads * copy.group;
    int32_t bad = 0;
    copy.bad = &bad;
    if (!kernels->tiles)
        return NO_KERNEL;
    if (bad_size(copy.batch) || bad_size(copy.heads) || bad_size(copy.group) || bad_size(heads) || bad_size(copy.batch * heads) ||
        bad_size(copy.count) || bad_size(copy.length) || copy.width < 1 || copy.width > WIDEST || !(copy.scaling >= 0.0f) ||
        LACKS(copy.batch * heads * copy.count, copy.query, copy.output) ||
        LACKS(copy.batch * heads * copy.length, copy.key, copy.value))
        return BAD_SIZE;
    run_in_pieces(&copy, kernels->tiles->attend, copy.batch * heads, copy.group, threads);
    return bad ? NO_MEMORY : DONE;
}

/* Some packed tokens as numbers, (batch * heads, count, width). */
ENTRY(unpack_states)
{
    struct unpack_states copy = *job;
    const int64_t heads = copy.batch * copy.heads;
    int32_t bad = 0;
    copy.bad = &bad;
    if (bad_size(copy.batch) || bad_size(copy.heads) || bad_size(heads) || bad_size(copy.first) || bad_size(copy.count) ||
        !is_float(copy.number) || states_are_bad(&copy.states, heads * (copy.first + copy.count)) ||
        LACKS(heads * copy.count, copy.output))
        return BAD_SIZE;
    run_in_pieces(&copy, kernels->unpack_states, heads, 1, threads);
    return bad ? BAD_CODE : DONE;
}
