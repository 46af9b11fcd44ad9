/* The kernels of search.h, inside BEGIN_TARGET and END_TARGET. */

/* A statement for `m` members of a group, compiled for each of the usual numbers. */
#define FOR_MEMBERS(COUNT, STATEMENT)                                                                                  \
    switch (COUNT) {                                                                                                   \
    case 4: { const int m = 4; STATEMENT; break; }                                                                     \
    case 8: { const int m = 8; STATEMENT; break; }                                                                     \
    default: { const int m = COUNT; STATEMENT; }                                                                       \
    }

/* How many members of each group come before each: those of a larger score, and of equal ones the earlier. */
static ALWAYS_INLINE void rank_members(const int m, const lanes *member, int_lanes *rank)
{
    for (int i = 0; i < m; i++)
        rank[i] = (int_lanes){0};
    for (int j = 1; j < m; j++)
        for (int i = 0; i < j; i++) {
            int_lanes later_is_larger = member[j] > member[i]; /* -1 where it is */
            rank[i] -= later_is_larger;
            rank[j] += 1 + later_is_larger;
        }
}

/* The scores of LINE groups from `first` on, and the ranks of their members; fewer groups than LINE are the first again. */
static ALWAYS_INLINE int rank_groups(const struct mask *job, const float *score, int64_t first, const int m,
                                     lanes *member, int_lanes *rank)
{
    const int64_t left = job->size / m - first, *places = job->places + first * m;
    const int used = left < LINE ? (int)left : LINE;
    for (int i = 0; i < m; i++)
        for (int l = 0; l < LINE; l++)
            member[i][l] = score[places[(l < used ? l : 0) * m + i] * job->score_stride[1]];
    rank_members(m, member, rank);
    return used;
}

static ALWAYS_INLINE void mask_row(const struct mask *job, int64_t row, const int m)
{
    uint8_t *mask = job->mask + row * job->mask_stride[0];
    lanes member[LARGEST_M];
    int_lanes rank[LARGEST_M];
    for (int64_t first = 0; first < job->size / m; first += LINE) {
        const int used = rank_groups(job, job->score + row * job->score_stride[0], first, m, member, rank);
        const int64_t *places = job->places + first * m;
        for (int l = 0; l < used; l++)
            for (int i = 0; i < m; i++)
                mask[places[l * m + i] * job->mask_stride[1]] = rank[i][l] < job->n;
    }
}

static void mask_rows(const void *argument, int64_t first, int64_t last)
{
    const struct mask *job = argument;
    for (int64_t row = first; row < last; row++)
        FOR_MEMBERS(job->m, mask_row(job, row, m))
}

static ALWAYS_INLINE double keep_row(const struct keep *job, int64_t row, const int m)
{
    const struct mask *masking = &job->masking;
    const float *weight = job->weight + row * job->weight_stride[0];
    const float *gradient = job->gradient + row * job->gradient_stride[0];
    lanes member[LARGEST_M];
    int_lanes rank[LARGEST_M];
    double sums[LINE] = {0}, total = 0;
    for (int64_t first = 0; first < masking->size / m; first += LINE) {
        const int used = rank_groups(masking, masking->score + row * masking->score_stride[0], first, m, member, rank);
        const int64_t *places = masking->places + first * m;
        for (int i = 0; i < m; i++)
            for (int l = 0; l < LINE; l++) {
                int64_t place = places[(l < used ? l : 0) * m + i];
                float product = weight[place * job->weight_stride[1]] * gradient[place * job->gradient_stride[1]];
                sums[l] += l < used && rank[i][l] < masking->n ? (double)product : 0.0;
            }
    }
    for (int l = 0; l < LINE; l++)
        total += sums[l];
    return total;
}

static void keep_rows(const void *argument, int64_t first, int64_t last)
{
    const struct keep *job = argument;
    for (int64_t row = first; row < last; row++)
        FOR_MEMBERS(job->masking.m, job->sums[row] = keep_row(job, row, m))
}

/* LINE numbers of a row, zeros behind the first `used`. */
static ALWAYS_INLINE lanes load_some(const float *from, int used)
{
    if (__builtin_expect(used == LINE, 1))
        return load_line(from);
    lanes found = {0};
    memcpy(&found, from, (size_t)used * sizeof *from);
    return found;
}

static ALWAYS_INLINE void prune_group(const struct prune *job, int64_t group, const int m)
{
    const int64_t *members = job->groups + group * m;
    lanes member[LARGEST_M];
    int_lanes rank[LARGEST_M];
    for (int64_t row = 0; row < job->rows; row += LINE) {
        const int used = job->rows - row < LINE ? (int)(job->rows - row) : LINE;
        for (int i = 0; i < m; i++)
            member[i] = load_some(job->score + members[i] * job->rows + row, used);
        rank_members(m, member, rank);
        for (int i = 0; i < m; i++) {
            const int64_t at = members[i] * job->rows + row;
            int_lanes goes = (rank[i] >= job->n) & (int_lanes)load_some(job->weight + at, used);
            memcpy(job->pruned + at, &goes, (size_t)used * sizeof *job->pruned);
        }
    }
}

static void prune_groups(const void *argument, int64_t first, int64_t last)
{
    const struct prune *job = argument;
    for (int64_t group = first; group < last; group++)
        FOR_MEMBERS(job->m, prune_group(job, group, m))
}

/* The model's loss where a weight is pruned less that where it is kept, for LINE rows of a channel. */
static ALWAYS_INLINE lanes prune_cost(const struct place *job, int64_t channel, int64_t row, int used)
{
    const int64_t at = channel * job->rows + row;
    lanes weight = load_some(job->weight + at, used), error = load_some(job->error + at, used);
    return ((weight - error - error) * job->curvature[channel] + load_some(job->slope + at, used)) * weight;
}

/* Of each group, for LINE rows: score and cost of the free channel, and of the member that a newcomer would displace. */
static ALWAYS_INLINE void read_group(const struct place *job, int64_t group, int64_t row, int used, const int m,
                                     lanes *values)
{
    const int64_t *members = job->groups + group * m, free = members[job->slots[group]];
    lanes member[LARGEST_M];
    int_lanes rank[LARGEST_M], threshold = {0}, rival = {0};
    int64_t rest[LARGEST_M];
    for (int i = 0, k = 0; i < m; i++)
        if (i != job->slots[group])
            rest[k++] = members[i];
    for (int k = 0; k < m - 1; k++)
        member[k] = load_some(job->score + rest[k] * job->rows + row, used);
    rank_members(m - 1, member, rank);
    for (int k = 0; k < m - 1; k++) {
        int_lanes last = rank[k] == job->n - 1;
        threshold |= last & (int_lanes)member[k];
        rival |= last & (int_lanes)prune_cost(job, rest[k], row, used);
    }
    values[0] = load_some(job->score + free * job->rows + row, used);
    values[1] = prune_cost(job, free, row, used);
    values[2] = (lanes)threshold;
    values[3] = (lanes)rival;
}

/* The sum of the lanes in double precision, in halves, quarters and so on. */
static ALWAYS_INLINE double total_in_double(lanes sums)
{
    typedef float half __attribute__((vector_size(LINE / 2 * sizeof(float))));
    typedef double doubles __attribute__((vector_size(LINE / 2 * sizeof(double))));
    half part[2];
    memcpy(part, &sums, sizeof part);
    const doubles eight = __builtin_convertvector(part[0], doubles) + __builtin_convertvector(part[1], doubles);
    const double four[4] = {eight[0] + eight[4], eight[1] + eight[5], eight[2] + eight[6], eight[3] + eight[7]};
    return four[0] + four[2] + (four[1] + four[3]);
}

/* Adds, for some rows, rival[g] - loss[c] wherever score[c] > threshold[g]: cost (count, count). */
static ALWAYS_INLINE void place_tile(const float *score, const float *loss, const float *threshold, const float *rival,
                                     int64_t rows, const int height, double *cost)
{
    lanes sums[4];
    for (int c = 0; c < height; c++)
        sums[c] = (lanes){0};
    for (int64_t row = 0; row < rows; row += LINE) {
        lanes limit = load_line(threshold + row), pruned = load_line(rival + row);
        for (int c = 0; c < height; c++) {
            int_lanes gain = (int_lanes)(pruned - load_line(loss + c * rows + row));
            sums[c] += (lanes)(gain & (load_line(score + c * rows + row) > limit));
        }
    }
    for (int c = 0; c < height; c++)
        cost[c] += total_in_double(sums[c]);
}

static int place_channels(const struct place *job)
{
    enum { CACHE = 1 << 17 }; /* numbers of the four matrices that stay in a core's cache: half a megabyte */
    const int64_t count = job->count, fit = CACHE / (4 * count) / LINE * LINE, block = fit < LINE ? LINE : fit;
    double *found = malloc((size_t)(count * count) * sizeof *found); /* (group, channel), a tile's costs side by side */
    float *memory = aligned_alloc(64, (size_t)(4 * count * block) * sizeof *memory);
    if (!memory || !found) {
        free(memory);
        free(found);
        return 0;
    }
    memset(found, 0, (size_t)(count * count) * sizeof *found);
    float *score = memory, *loss = score + count * block, *threshold = loss + count * block,
          *rival = threshold + count * block;
    for (int64_t first = 0; first < job->rows; first += block) {
        const int64_t left = job->rows - first, rows = left < block ? (left + LINE - 1) / LINE * LINE : block;
        for (int64_t group = 0; group < count; group++)
            for (int64_t row = 0; row < rows; row += LINE) {
                const int used = left - row < LINE ? (int)(left - row) : LINE;
                lanes values[4];
                if (job->m == 4)
                    read_group(job, group, first + row, used, 4, values);
                else
                    read_group(job, group, first + row, used, job->m, values);
                for (int part = 0; part < 4; part++)
                    memcpy(memory + part * count * block + group * rows + row, values + part, sizeof *values);
            }
        for (int64_t channel = 0; channel < count; channel += 4)
            for (int64_t group = 0; group < count; group++) {
                const float *limits = threshold + group * rows, *rivals = rival + group * rows;
                const float *scores = score + channel * rows, *losses = loss + channel * rows;
                double *to = found + group * count + channel;
                switch (count - channel) {
                case 1: place_tile(scores, losses, limits, rivals, rows, 1, to); break;
                case 2: place_tile(scores, losses, limits, rivals, rows, 2, to); break;
                case 3: place_tile(scores, losses, limits, rivals, rows, 3, to); break;
                default: place_tile(scores, losses, limits, rivals, rows, 4, to);
                }
            }
    }
    for (int64_t group = 0; group < count; group++)
        for (int64_t channel = 0; channel < count; channel++)
            job->cost[channel * count + group] += found[group * count + channel];
    free(memory);
    free(found);
    return 1;
}

/* -1 in the lanes of channels that are kept: those of the bits of one byte or two. */
static ALWAYS_INLINE int_lanes kept_lanes(const uint8_t *bits, int used)
{
    const int_lanes bit = {1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11, 1 << 10, 1 << 9, 1 << 8,
                           1 << 7,  1 << 6,  1 << 5,  1 << 4,  1 << 3,  1 << 2,  1 << 1, 1};
    const int32_t both = bits[0] << 8 | (used > 8 ? bits[1] : 0);
    return (((int_lanes){0} + both) & bit) != 0;
}

/* As f32_to_bf16, in the lower halves of the lanes. */
static ALWAYS_INLINE int_lanes round_to_bf16(int_lanes bits)
{
    typedef uint32_t words __attribute__((vector_size(LINE * sizeof(uint32_t)))); /* those of NaN would overflow */
    const int_lanes rounded = (int_lanes)((words)bits + 0x7fff + ((words)bits >> 16 & 1));
    const int_lanes nan = (bits & 0x7fffffff) > 0x7f800000;
    return ((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16;
}

static ALWAYS_INLINE void apply_row(const struct apply *job, int64_t row, const int32_t number)
{
    typedef uint16_t halves __attribute__((vector_size(LINE * sizeof(uint16_t))));
    const float *weight = job->weight + row * job->row_stride;
    const uint8_t *bits = job->bits + row * ((job->width + 7) / 8);
    for (int64_t channel = 0; channel < job->width; channel += LINE, bits += LINE / 8) {
        const int used = job->width - channel < LINE ? (int)(job->width - channel) : LINE;
        const int64_t at = row * job->width + channel;
        const int_lanes kept = (int_lanes)load_some(weight + channel, used) & kept_lanes(bits, used);
        if (number == F32) {
            memcpy((float *)job->masked + at, &kept, (size_t)used * sizeof(float));
        } else {
            const halves rounded = __builtin_convertvector(round_to_bf16(kept), halves);
            memcpy((uint16_t *)job->masked + at, &rounded, (size_t)used * sizeof(uint16_t));
        }
    }
}

static void apply_rows(const void *argument, int64_t first, int64_t last)
{
    const struct apply *job = argument;
    for (int64_t row = first; row < last; row++)
        if (job->number == F32)
            apply_row(job, row, F32);
        else
            apply_row(job, row, BF16);
}
