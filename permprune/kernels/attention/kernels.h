/* The kernels of attention.h, inside BEGIN_TARGET and END_TARGET. Expects the functions that unpack.h needs. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT ON
#endif

#include "attention/unpack.h"

static ALWAYS_INLINE lanes spread(float value) { return value - (lanes){0}; }

static ALWAYS_INLINE lanes select_lanes(int_lanes chosen, lanes from, lanes other)
{
    return (lanes)(((int_lanes)from & chosen) | ((int_lanes)other & ~chosen));
}

/* ---- scores and sums ---- */

/* The sums of the lanes of four vectors. */
static ALWAYS_INLINE void store_totals(float *to, const lanes *sums)
{
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    four part[4];
    UNROLLED for (int i = 0; i < 4; i++) {
        eight half = __builtin_shufflevector(sums[i], sums[i], 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(sums[i], sums[i], 8, 9, 10, 11, 12, 13, 14, 15);
        part[i] = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
    }
    four low = __builtin_shufflevector(part[0], part[1], 0, 4, 1, 5) + __builtin_shufflevector(part[0], part[1], 2, 6, 3, 7);
    four high = __builtin_shufflevector(part[2], part[3], 0, 4, 1, 5) + __builtin_shufflevector(part[2], part[3], 2, 6, 3, 7);
    four all = __builtin_shufflevector(low, high, 0, 1, 4, 5) + __builtin_shufflevector(low, high, 2, 3, 6, 7);
    memcpy(to, &all, sizeof all);
}

/* score[t] = query . line t, for TOKENS lines. */
static ALWAYS_INLINE void multiply_lines(const float *query, const float *line, int64_t stride, float *score)
{
    for (int token = 0; token < TOKENS; token += 4, line += 4 * stride) {
        lanes sums[4] = {{0}, {0}, {0}, {0}};
        for (int64_t c = 0; c < stride; c += LINE) {
            lanes queries = load_line(query + c);
            UNROLLED for (int i = 0; i < 4; i++) sums[i] += load_line(line + i * stride + c) * queries;
        }
        store_totals(score + token, sums);
    }
}

/* sum[r] += share[r][t] * line t, for `rows` rows. */
static ALWAYS_INLINE void add_lines(const float *share, const float *line, int64_t stride, int64_t count, float *sum,
                                    const int rows)
{
    for (int64_t c = 0; c < stride; c += LINE) {
        lanes total[4];
        UNROLLED for (int r = 0; r < rows; r++) total[r] = load_line(sum + r * stride + c);
        for (int64_t token = 0; token < count; token++) {
            lanes values = load_line(line + token * stride + c);
            UNROLLED for (int r = 0; r < rows; r++) total[r] += values * share[r * TOKENS + token];
        }
        UNROLLED for (int r = 0; r < rows; r++) store_line(sum + r * stride + c, total[r]);
    }
}

/* e^x for x <= 0, with a relative error of about 1e-7. */
static ALWAYS_INLINE lanes exponential(lanes x)
{
    const lanes moved = x * 1.44269504f + 12582912.0f; /* 1.5 x 2^23: the lowest bits are the nearest integer */
    const lanes whole = moved - 12582912.0f;
    const lanes rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    lanes sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.0f;
    const lanes power = (lanes)(((int_lanes)moved << 23) + 0x3f800000);
    return (lanes)((int_lanes)(sum * power) & ~(int_lanes)(x < -87.0f));
}

static ALWAYS_INLINE float exponential_of(float x) { return exponential(spread(x))[0]; }

/* limit * tanh(score / limit) */
static ALWAYS_INLINE lanes cap(lanes score, float limit)
{
    const lanes x = score / limit;
    const int_lanes sign = (int_lanes)x & INT32_MIN;
    const lanes small = exponential(-2.0f * (lanes)((int_lanes)x & INT32_MAX));
    return (lanes)((int_lanes)(limit * (1.0f - small) / (1.0f + small)) | sign);
}

/* A head, a part of its tokens, and some of its rows of queries: row r is query r % count of head r / count of a group. */
struct rows {
    const struct attend *attention;
    int64_t batch, head, first, count;
    float query[ROWS * WIDEST], sum[ROWS * WIDEST], score[ROWS * TOKENS], line[TOKENS * WIDEST];
    float level[2][WIDEST];
    float largest[ROWS], total[ROWS], unit[TOKENS];
};

static int64_t offset_of(const struct rows *rows, int64_t row, const int64_t *stride)
{
    const int64_t count = rows->attention->count, head = rows->head * rows->attention->group + row / count;
    return rows->batch * stride[0] + head * stride[1] + row % count * stride[2];
}

static void start_rows(struct rows *rows)
{
    const struct attend *job = rows->attention;
    const int64_t width = job->whole[0].width, stride = lines_of(width);
    const int64_t *order = job->order[0] ? job->order[0] + rows->head * width : NULL;
    memset(rows->query, 0, (size_t)(rows->count * stride) * sizeof(float));
    memset(rows->sum, 0, (size_t)(rows->count * lines_of(job->whole[1].width)) * sizeof(float));
    for (int64_t r = 0; r < rows->count; r++) {
        const int64_t from = offset_of(rows, rows->first + r, job->query_stride);
        for (int64_t c = 0; c < width; c++)
            rows->query[r * stride + c] = read_number(job->query, from + (order ? order[c] : c), job->number) * job->scaling;
        rows->largest[r] = -FLT_MAX;
        rows->total[r] = 0;
    }
}

/* Adds biases and masks to the scores of a row for `count` tokens from `position` on; those after them become -infinity. */
static ALWAYS_INLINE void mask_scores(const struct rows *rows, int64_t row, int64_t position, int64_t count, float *score)
{
    const struct attend *job = rows->attention;
    if (job->softcap > 0)
        for (int t = 0; t < TOKENS; t += LINE)
            store_line(score + t, cap(load_line(score + t), job->softcap));
    if (job->added) {
        const float *added = job->added + offset_of(rows, row, job->added_stride) + position;
        for (int64_t t = 0; t < count; t++)
            score[t] += added[t];
    }
    if (job->mask) {
        const uint8_t *mask = job->mask + offset_of(rows, row, job->mask_stride) + position;
        for (int64_t t = 0; t < count; t++)
            score[t] = mask[t] ? score[t] : -INFINITY;
    } else if (job->causal)
        count = smaller(count, job->length - job->count + row % job->count + 1 - position);
    for (int64_t t = count > 0 ? count : 0; t < TOKENS; t++)
        score[t] = -INFINITY;
}

/* Replaces the scores of a row by e^(score - largest), and brings what was added up before to the new largest score. */
static ALWAYS_INLINE void exponentiate(struct rows *rows, int64_t r, int64_t stride)
{
    float *score = rows->score + r * TOKENS;
    lanes most = spread(rows->largest[r]), total = {0};
    for (int t = 0; t < TOKENS; t += LINE) {
        lanes scores = load_line(score + t);
        most = select_lanes(scores > most, scores, most);
    }
    float largest = rows->largest[r];
    for (int i = 0; i < LINE; i++)
        largest = most[i] > largest ? most[i] : largest;
    if (largest > rows->largest[r]) {
        const float factor = exponential_of(rows->largest[r] - largest);
        for (int64_t c = 0; c < stride; c += LINE)
            store_line(rows->sum + r * stride + c, load_line(rows->sum + r * stride + c) * factor);
        rows->total[r] *= factor;
        rows->largest[r] = largest;
    }
    for (int t = 0; t < TOKENS; t += LINE) {
        lanes share = exponential(load_line(score + t) - largest);
        store_line(score + t, share);
        total += share;
    }
    for (int i = 0; i < LINE; i++)
        rows->total[r] += total[i];
}

/* Multiplies the scores, or the shares, of a row by the units of its tokens. */
static ALWAYS_INLINE void scale_line(float *score, const float *unit)
{
    for (int t = 0; t < TOKENS; t += LINE)
        store_line(score + t, load_line(score + t) * load_line(unit + t));
}

static ALWAYS_INLINE void add_values(struct rows *rows, int64_t count, int64_t stride)
{
    for (int64_t r = 0; r < rows->count; r += 4) {
        const float *share = rows->score + r * TOKENS;
        float *sum = rows->sum + r * stride;
        switch (smaller(4, rows->count - r)) {
        case 1: add_lines(share, rows->line, stride, count, sum, 1); break;
        case 2: add_lines(share, rows->line, stride, count, sum, 2); break;
        case 3: add_lines(share, rows->line, stride, count, sum, 3); break;
        default: add_lines(share, rows->line, stride, count, sum, 4);
        }
    }
}

/* Reads at most TOKENS tokens from `position` on, before `stop`; returns how many. */
static int64_t read_tokens(struct rows *rows, int64_t position, int64_t stop, int *good)
{
    const struct attend *job = rows->attention;
    const int64_t packed_stop = job->before + job->packed_tokens, head = rows->batch * job->heads + rows->head;
    const int packed = position >= job->before && position < packed_stop;
    const struct states *states = packed ? job->packed : job->whole;
    const int64_t limit = packed ? packed_stop : position < job->before ? job->before : stop;
    const int64_t count = smaller(smaller(limit, stop) - position, TOKENS);
    const int64_t index = packed ? position - job->before : position < job->before ? position : position - job->packed_tokens;
    const int64_t capacity = states->tokens / (job->batch * job->heads);
    const int64_t widths[2] = {lines_of(states[0].width), lines_of(states[1].width)};
    *good &= unpack_tokens(&states[0], head * capacity + index, count, rows->level[0], rows->line, rows->unit);
    for (int64_t r = 0; r < rows->count; r++) {
        float *score = rows->score + r * TOKENS;
        multiply_lines(rows->query + r * widths[0], rows->line, widths[0], score);
        scale_line(score, rows->unit);
        mask_scores(rows, rows->first + r, position, count, score);
        exponentiate(rows, r, widths[1]);
    }
    *good &= unpack_tokens(&states[1], head * capacity + index, count, rows->level[1], rows->line, rows->unit);
    for (int64_t r = 0; r < rows->count; r++)
        scale_line(rows->score + r * TOKENS, rows->unit);
    add_values(rows, count, widths[1]);
    return count;
}

static void attend(const void *argument, int64_t first, int64_t last)
{
    const struct attend *job = argument;
    const int64_t height = job->group * job->count, width = job->whole[1].width, stride = lines_of(width);
    struct rows rows;
    int good = 1;
    memset(rows.line, 0, sizeof rows.line); /* lines that are not written yet are multiplied, too */
    rows.attention = job;
    for (int64_t task = first; task < last; task++) {
        const int64_t start = task % job->parts * PART_TOKENS, stop = smaller(start + PART_TOKENS, job->length);
        rows.head = task / job->parts % job->heads;
        rows.batch = task / job->parts / job->heads;
        for (int side = 0; side < 2; side++)
            read_level(&job->packed[side], rows.head, rows.level[side]);
        for (rows.first = 0; rows.first < height; rows.first += ROWS) {
            rows.count = smaller(ROWS, height - rows.first);
            start_rows(&rows);
            for (int64_t position = start; position < stop;)
                position += read_tokens(&rows, position, stop, &good);
            for (int64_t r = 0; r < rows.count; r++) {
                float *to = job->partial + (task * height + rows.first + r) * (width + 2);
                memcpy(to, rows.sum + r * stride, (size_t)width * sizeof *to);
                to[width] = rows.largest[r];
                to[width + 1] = rows.total[r];
            }
        }
    }
    if (!good)
        report_bad(job->bad);
}

static void combine(const void *argument, int64_t first, int64_t last)
{
    const struct attend *job = argument;
    const int64_t height = job->group * job->count, width = job->whole[1].width, size = width + 2;
    float sum[WIDEST];
    for (int64_t task = first; task < last; task++)
        for (int64_t row = 0; row < height; row++) {
            const int64_t kv_head = task % job->heads, head = kv_head * job->group + row / job->count;
            const float *part = job->partial + (task * job->parts * height + row) * size;
            float largest = job->sinks ? job->sinks[head] : -FLT_MAX;
            for (int64_t p = 0; p < job->parts; p++)
                largest = part[p * height * size + width] > largest ? part[p * height * size + width] : largest;
            float total = job->sinks ? exponential_of(job->sinks[head] - largest) : 0.0f;
            memset(sum, 0, (size_t)width * sizeof *sum);
            for (int64_t p = 0; p < job->parts; p++) {
                const float *from = part + p * height * size, factor = exponential_of(from[width] - largest);
                total += from[width + 1] * factor;
                for (int64_t c = 0; c < width; c++)
                    sum[c] += from[c] * factor;
            }
            const int64_t query = task / job->heads * job->count + row % job->count;
            const int64_t to = (query * job->heads * job->group + head) * width;
            const int64_t *order = job->order[1] ? job->order[1] + kv_head * width : NULL;
            const float inverse = 1.0f / (total < FLT_MIN ? FLT_MIN : total);
            for (int64_t c = 0; c < width; c++)
                write_number(job->output, to + (order ? order[c] : c), job->number, sum[c] * inverse);
        }
}

static void unpack_states(const void *argument, int64_t first, int64_t last)
{
    const struct unpack_states *job = argument;
    const int64_t width = job->states.width, stride = lines_of(width);
    float level[WIDEST], line[TOKENS * WIDEST], unit[TOKENS];
    int good = 1;
    for (int64_t task = first; task < last; task++) {
        const int64_t begin = task * (job->states.tokens / (job->batch * job->heads)) + job->first;
        read_level(&job->states, task % job->heads, level);
        for (int64_t token = 0; token < job->count; token += TOKENS) {
            const int64_t count = smaller(TOKENS, job->count - token);
            good &= unpack_tokens(&job->states, begin + token, count, level, line, unit);
            for (int64_t t = 0; t < count; t++)
                for (int64_t c = 0; c < width; c++)
                    write_number(job->output, (task * job->count + token + t) * width + c, job->number,
                                 line[t * stride + c] * unit[t]);
        }
    }
    if (!good)
        report_bad(job->bad);
}
