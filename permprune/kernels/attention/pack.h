/* Packing of states: which channels of a token are kept, and its parts. Expects, inside BEGIN_TARGET and END_TARGET, what
 * unpack.h has. */

/* A token while it is packed: magnitudes and their weights, level times weight squared, scores, and -1 for channels that
 * are pruned. Channels after the width are zero. */
struct token {
    float state[WIDEST], magnitude[WIDEST], weight[WIDEST], level[WIDEST], squared[WIDEST], amplitude;
    int32_t score[WIDEST], pruned[WIDEST];
};

/* The nearest integer within limits, of halves the even one; 0 for NaN. */
static ALWAYS_INLINE int32_t nearest(float value, float least, float most)
{
    value = value > most ? most : value >= least ? value : value == value ? least : 0.0f;
    return (int32_t)((value + 12582912.0f) - 12582912.0f); /* 1.5 x 2^23: the lowest bits are the nearest integer */
}

/* The place of the nearest of `magnitudes`; of NaN the last. */
static ALWAYS_INLINE int32_t place_of(float value)
{
    int32_t place = 0;
    for (int i = 0; i < LINE - 1; i++)
        place += !(value <= between[i]);
    return place;
}

static ALWAYS_INLINE float total_of(lanes values)
{
    float sum = 0;
    for (int i = 0; i < LINE; i++)
        sum += values[i];
    return sum;
}

/* Prunes all but the `n` largest of `m` scores, which are not negative; of equal ones the first is kept. */
static ALWAYS_INLINE void select_few(const int32_t *score, int32_t *pruned, int64_t n, int64_t m)
{
    for (int64_t c = 0; c < m; c++) {
        int64_t rank = 0;
        for (int64_t other = 0; other < m; other++)
            rank += score[other] > score[c] || (score[other] == score[c] && other < c);
        pruned[c] = -(rank >= n);
    }
}

/* The same for many, by bisection between scores that at least `n`, and that fewer than `n`, reach. */
static ALWAYS_INLINE void select_many(const int32_t *score, int32_t *pruned, int64_t n, int64_t m)
{
    int32_t low = INT32_MAX, high = 0;
    for (int64_t c = 0; c < m; c++) {
        low = score[c] < low ? score[c] : low;
        high = score[c] > high ? score[c] : high;
    }
    high++;
    int32_t found = m;
    while (high - low > 1 && found != n) {
        const int32_t middle = low + (high - low) / 2;
        int32_t count = 0;
        for (int64_t c = 0; c < m; c++)
            count += score[c] >= middle;
        if (count < n)
            high = middle;
        else {
            low = middle;
            found = count;
        }
    }
    for (int64_t c = 0; c < m; c++)
        pruned[c] = -(score[c] < low);
    for (int64_t c = m - 1; found > n; c--) /* all of these scores are equal */
        if (score[c] == low) {
            pruned[c] = -1;
            found--;
        }
}

/* Chooses the channels with the largest | |state| - amplitude * level | * weight, and finds the amplitude for the others. */
static ALWAYS_INLINE void choose(struct token *token, const struct pack_states *job, int recovers)
{
    const int64_t width = job->states.width, m = job->m;
    const int_lanes positive = (int_lanes){0} + INT32_MAX, infinite = (int_lanes){0} + 0x7f800000;
    for (int64_t c = 0; c < width; c += LINE) {
        const lanes error = load_line(token->magnitude + c) - load_line(token->level + c) * token->amplitude;
        const int_lanes score = (int_lanes)(error * load_line(token->weight + c)) & positive;
        const int_lanes beyond = score > infinite; /* NaN is kept */
        const int_lanes shown = (score & ~beyond) | (infinite & beyond);
        memcpy(token->score + c, &shown, sizeof shown);
    }
    for (int64_t c = 0; c < width; c += m)
        if (m == 4)
            select_few(token->score + c, token->pruned + c, job->n, 4);
        else
            select_many(token->score + c, token->pruned + c, job->n, m);
    if (!recovers)
        return;
    lanes product = {0}, square = {0};
    for (int64_t c = 0; c < width; c += LINE) {
        int_lanes pruned;
        memcpy(&pruned, token->pruned + c, sizeof pruned);
        const lanes squared = load_line(token->squared + c);
        product += (lanes)((int_lanes)(load_line(token->magnitude + c) * squared) & pruned);
        square += (lanes)((int_lanes)(load_line(token->level + c) * squared) & pruned);
    }
    token->amplitude = total_of(product) / total_of(square);
}

static ALWAYS_INLINE uint64_t mask_of(const struct token *token, int64_t channel, int64_t count)
{
    uint64_t mask = 0;
    for (int64_t c = 0; c < count; c++)
        mask |= (uint64_t)(token->pruned[channel + c] == 0) << c;
    return mask;
}

/* The code of a token; see `read_mask`. `code` is zero before. */
static void write_code(const struct token *token, const struct states *states, uint8_t *code)
{
    if (states->kind == BITS) {
        for (int64_t channel = 0; channel < states->width; channel += 8)
            code[channel / 8] = (uint8_t)mask_of(token, channel, smaller(8, states->width - channel));
        return;
    }
    const int64_t bytes = (states->width / 4 + 7) / 8;
    for (int64_t group = 0; group < states->width / 4; group++) {
        const uint64_t kept = mask_of(token, group * 4, 4), one = states->kind == THREE_OF_4 ? ~kept : kept;
        uint64_t planes[3] = {(one >> 1 | one >> 3) & 1, (one >> 2 | one >> 3) & 1, 0};
        if (states->kind == TWO_OF_4) {
            planes[0] = kept & 1;
            planes[1] = ~(kept ^ kept >> 1) & 1;
            planes[2] = ~(kept ^ kept >> 2) & 1;
        }
        for (int plane = 0; plane < (states->kind == TWO_OF_4 ? 3 : 2); plane++)
            code[plane * bytes + group / 8] |= (uint8_t)(planes[plane] << group % 8);
    }
}

/* Writes the parts of token `index`. */
static void write_token(const struct token *token, const struct states *states, int64_t index)
{
    uint8_t *code = (uint8_t *)states->code + index * states->code_bytes;
    uint8_t *signs = states->signs ? (uint8_t *)states->signs + index * states->sign_bytes : NULL;
    const int number = states->number;
    float step = 1.0f;
    if (has_scale(number)) {
        float most = 0;
        for (int64_t c = 0; c < states->width; c++)
            if (!token->pruned[c] && !(token->magnitude[c] <= most) && most == most) /* NaN stays */
                most = token->magnitude[c];
        const uint16_t scale = f32_to_bf16(most / 127);
        ((uint16_t *)states->scale)[index] = scale;
        step = bf16_to_f32(scale) < FLT_MIN ? FLT_MIN : bf16_to_f32(scale);
    }
    memset(code, 0, (size_t)states->code_bytes);
    write_code(token, states, code);
    if (signs)
        memset(signs, 0, (size_t)states->sign_bytes);
    char *values = (char *)states->values + index * value_bytes(states->kept, number);
    int64_t kept = 0, pruned = 0;
    if (number == I5)
        memset(values, 0, (size_t)value_bytes(states->kept, number));
    for (int64_t c = 0; c < states->width; c++) {
        if (signs && (number == I5 || token->pruned[c])) {
            const int64_t bit = number == I5 ? c : pruned;
            signs[bit / 8] |= (uint8_t)((token->state[c] < 0) << bit % 8);
        }
        if (token->pruned[c])
            pruned++;
        else if (number == I5) {
            values[kept / 2] |= (char)(place_of(token->magnitude[c] / step) << kept % 2 * 4);
            kept++;
        } else if (number == I8)
            values[kept++] = (char)nearest(token->state[c] / step, -127, 127);
        else
            write_number(values, kept++, number, token->state[c]);
    }
    if (states->amplitude && has_scale(number))
        ((uint8_t *)states->amplitude)[index] = (uint8_t)nearest(2 * token->amplitude / step, 0, 255);
    else if (states->amplitude)
        write_number((void *)states->amplitude, index, number, token->amplitude);
}

static void pack_states(const void *own, int64_t first, int64_t last)
{
    const struct pack_states *job = own;
    const int64_t width = job->states.width;
    struct token token;
    memset(&token, 0, sizeof token);
    for (int64_t task = first; task < last; task++) {
        const int64_t head = task % job->heads, at = task / job->heads * job->stride[0] + head * job->stride[1];
        for (int64_t c = 0; c < width; c++) {
            token.weight[c] = job->weight[head * width + c];
            token.level[c] = job->states.level[head * width + c];
            token.squared[c] = token.weight[c] * token.weight[c] * token.level[c];
        }
        for (int64_t index = 0; index < job->count; index++) {
            for (int64_t c = 0; c < width; c++) {
                token.state[c] = read_number(job->numbers, at + index * job->stride[2] + c, job->number);
                token.magnitude[c] = fabsf(token.state[c]);
            }
            token.amplitude = 0;
            for (int64_t turn = 0; turn <= job->turns; turn++)
                choose(&token, job, job->states.amplitude != NULL);
            write_token(&token, &job->states, task * job->count + index);
        }
    }
}
