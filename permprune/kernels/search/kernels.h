/* `NAME_search`: the kernels of search.h. Expects NAME, inside BEGIN_TARGET and END_TARGET. */

static ALWAYS_INLINE scores load_side(const float *from)
{
    scores found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* How many members of each group come before each: those of a larger score, and of equal ones the earlier. */
static ALWAYS_INLINE void rank_members(const int m, const scores *member, counts *rank)
{
    for (int i = 0; i < m; i++)
        rank[i] = (counts){0};
    for (int j = 1; j < m; j++)
        for (int i = 0; i < j; i++) {
            counts later_is_larger = member[j] > member[i]; /* -1 where it is */
            rank[i] -= later_is_larger;
            rank[j] += 1 + later_is_larger;
        }
}

/* The scores of SIDE groups from `first` on, and the ranks of their members; fewer groups than SIDE are the first again. */
static ALWAYS_INLINE int rank_groups(const struct masking *job, const float *score, int64_t first, const int m,
                                     scores *member, counts *rank)
{
    const int64_t left = job->size / m - first, *places = job->places + first * m;
    const int lanes = left < SIDE ? (int)left : SIDE;
    for (int i = 0; i < m; i++)
        for (int l = 0; l < SIDE; l++)
            member[i][l] = score[places[(l < lanes ? l : 0) * m + i] * job->column_stride];
    rank_members(m, member, rank);
    return lanes;
}

static ALWAYS_INLINE void mask_row(const struct masking *job, int64_t row, const int m)
{
    uint8_t *mask = job->mask + row * job->mask_row_stride;
    scores member[LARGEST_M];
    counts rank[LARGEST_M];
    for (int64_t first = 0; first < job->size / m; first += SIDE) {
        const int lanes = rank_groups(job, job->score + row * job->row_stride, first, m, member, rank);
        const int64_t *places = job->places + first * m;
        for (int l = 0; l < lanes; l++)
            for (int i = 0; i < m; i++)
                mask[places[l * m + i] * job->mask_column_stride] = rank[i][l] < job->n;
    }
}

static void PASTE(NAME, _mask)(const void *masking, int64_t first, int64_t last)
{
    const struct masking *job = masking;
    for (int64_t row = first; row < last; row++)
        switch (job->m) { /* a loop for each of the usual sizes */
        case 4: mask_row(job, row, 4); break;
        case 8: mask_row(job, row, 8); break;
        default: mask_row(job, row, job->m);
        }
}

static ALWAYS_INLINE double keep_row(const struct keeping *job, int64_t row, const int m)
{
    const struct masking *masking = &job->masking;
    const float *weight = job->weight + row * job->weight_row_stride;
    const float *gradient = job->gradient + row * job->gradient_row_stride;
    scores member[LARGEST_M];
    counts rank[LARGEST_M];
    double sums[SIDE] = {0}, total = 0;
    for (int64_t first = 0; first < masking->size / m; first += SIDE) {
        const int lanes = rank_groups(masking, masking->score + row * masking->row_stride, first, m, member, rank);
        const int64_t *places = masking->places + first * m;
        for (int i = 0; i < m; i++)
            for (int l = 0; l < SIDE; l++) {
                int64_t place = places[(l < lanes ? l : 0) * m + i];
                float product = weight[place * job->weight_column_stride] * gradient[place * job->gradient_column_stride];
                sums[l] += l < lanes && rank[i][l] < masking->n ? (double)product : 0.0;
            }
    }
    for (int l = 0; l < SIDE; l++)
        total += sums[l];
    return total;
}

static void PASTE(NAME, _keep)(const void *keeping, int64_t first, int64_t last)
{
    const struct keeping *job = keeping;
    for (int64_t row = first; row < last; row++)
        switch (job->masking.m) {
        case 4: job->sums[row] = keep_row(job, row, 4); break;
        case 8: job->sums[row] = keep_row(job, row, 8); break;
        default: job->sums[row] = keep_row(job, row, job->masking.m);
        }
}

/* SIDE numbers of a row, zeros behind the first `lanes`. */
static ALWAYS_INLINE scores load_some(const float *from, int lanes)
{
    if (__builtin_expect(lanes == SIDE, 1))
        return load_side(from);
    scores found = {0};
    memcpy(&found, from, (size_t)lanes * sizeof *from);
    return found;
}

static ALWAYS_INLINE void prune_group(const struct pruning *job, int64_t group, const int m)
{
    const int64_t *members = job->groups + group * m;
    scores member[LARGEST_M];
    counts rank[LARGEST_M];
    for (int64_t row = 0; row < job->rows; row += SIDE) {
        const int lanes = job->rows - row < SIDE ? (int)(job->rows - row) : SIDE;
        for (int i = 0; i < m; i++)
            member[i] = load_some(job->score + members[i] * job->rows + row, lanes);
        rank_members(m, member, rank);
        for (int i = 0; i < m; i++) {
            const int64_t at = members[i] * job->rows + row;
            counts goes = (rank[i] >= job->n) & (counts)load_some(job->weight + at, lanes);
            memcpy(job->pruned + at, &goes, (size_t)lanes * sizeof *job->pruned);
        }
    }
}

static void PASTE(NAME, _prune)(const void *pruning, int64_t first, int64_t last)
{
    const struct pruning *job = pruning;
    for (int64_t group = first; group < last; group++)
        switch (job->m) {
        case 4: prune_group(job, group, 4); break;
        case 8: prune_group(job, group, 8); break;
        default: prune_group(job, group, job->m);
        }
}

/* The model's loss where a weight is pruned less that where it is kept, for SIDE rows of a channel. */
static ALWAYS_INLINE scores prune_cost(const struct placement *job, int64_t channel, int64_t row, int lanes)
{
    const int64_t at = channel * job->rows + row;
    scores weight = load_some(job->weight + at, lanes), error = load_some(job->error + at, lanes);
    return ((weight - error - error) * job->curvature[channel] + load_some(job->slope + at, lanes)) * weight;
}

/* Of each group, for SIDE rows: score and cost of the free channel, and of the member that a newcomer would displace. */
static ALWAYS_INLINE void read_group(const struct placement *job, int64_t group, int64_t row, int lanes, const int m,
                                     scores *of)
{
    const int64_t *members = job->groups + group * m, free = members[job->slots[group]];
    scores member[LARGEST_M];
    counts rank[LARGEST_M], threshold = {0}, rival = {0};
    int64_t rest[LARGEST_M];
    for (int i = 0, k = 0; i < m; i++)
        if (i != job->slots[group])
            rest[k++] = members[i];
    for (int k = 0; k < m - 1; k++)
        member[k] = load_some(job->score + rest[k] * job->rows + row, lanes);
    rank_members(m - 1, member, rank);
    for (int k = 0; k < m - 1; k++) {
        counts last = rank[k] == job->n - 1;
        threshold |= last & (counts)member[k];
        rival |= last & (counts)prune_cost(job, rest[k], row, lanes);
    }
    of[0] = load_some(job->score + free * job->rows + row, lanes);
    of[1] = prune_cost(job, free, row, lanes);
    of[2] = (scores)threshold;
    of[3] = (scores)rival;
}

/* The sum of the lanes in double precision, in halves, quarters and so on. */
static ALWAYS_INLINE double total_of(scores sums)
{
    typedef float half __attribute__((vector_size(SIDE / 2 * sizeof(float))));
    typedef double doubles __attribute__((vector_size(SIDE / 2 * sizeof(double))));
    half part[2];
    memcpy(part, &sums, sizeof part);
    const doubles eight = __builtin_convertvector(part[0], doubles) + __builtin_convertvector(part[1], doubles);
    const double four[4] = {eight[0] + eight[4], eight[1] + eight[5], eight[2] + eight[6], eight[3] + eight[7]};
    return four[0] + four[2] + (four[1] + four[3]);
}

/* Adds, for some rows, rival[g] - own[c] wherever score[c] > threshold[g]: cost (count, count). */
static ALWAYS_INLINE void place_tile(const float *score, const float *own, const float *threshold, const float *rival,
                                     int64_t rows, const int height, double *cost)
{
    scores sums[4];
    for (int c = 0; c < height; c++)
        sums[c] = (scores){0};
    for (int64_t row = 0; row < rows; row += SIDE) {
        scores limit = load_side(threshold + row), pruned = load_side(rival + row);
        for (int c = 0; c < height; c++) {
            counts gain = (counts)(pruned - load_side(own + c * rows + row));
            sums[c] += (scores)(gain & (load_side(score + c * rows + row) > limit));
        }
    }
    for (int c = 0; c < height; c++)
        cost[c] += total_of(sums[c]);
}

static int PASTE(NAME, _place)(const struct placement *job)
{
    enum { CACHE = 1 << 17 }; /* numbers of the four matrices that stay in a core's cache: half a megabyte */
    const int64_t count = job->count, fit = CACHE / (4 * count) / SIDE * SIDE, block = fit < SIDE ? SIDE : fit;
    double *found = malloc((size_t)(count * count) * sizeof *found); /* (group, channel), a tile's costs side by side */
    float *memory = aligned_alloc(64, (size_t)(4 * count * block) * sizeof *memory);
    if (!memory || !found) {
        free(memory);
        free(found);
        return 0;
    }
    memset(found, 0, (size_t)(count * count) * sizeof *found);
    float *score = memory, *own = score + count * block, *threshold = own + count * block,
          *rival = threshold + count * block;
    for (int64_t first = 0; first < job->rows; first += block) {
        const int64_t left = job->rows - first, rows = left < block ? (left + SIDE - 1) / SIDE * SIDE : block;
        for (int64_t group = 0; group < count; group++)
            for (int64_t row = 0; row < rows; row += SIDE) {
                const int lanes = left - row < SIDE ? (int)(left - row) : SIDE;
                scores of[4];
                if (job->m == 4)
                    read_group(job, group, first + row, lanes, 4, of);
                else
                    read_group(job, group, first + row, lanes, job->m, of);
                for (int part = 0; part < 4; part++)
                    memcpy(memory + part * count * block + group * rows + row, of + part, sizeof *of);
            }
        for (int64_t channel = 0; channel < count; channel += 4)
            for (int64_t group = 0; group < count; group++) {
                const float *limits = threshold + group * rows, *rivals = rival + group * rows;
                const float *scores = score + channel * rows, *owns = own + channel * rows;
                double *to = found + group * count + channel;
                switch (count - channel) {
                case 1: place_tile(scores, owns, limits, rivals, rows, 1, to); break;
                case 2: place_tile(scores, owns, limits, rivals, rows, 2, to); break;
                case 3: place_tile(scores, owns, limits, rivals, rows, 3, to); break;
                default: place_tile(scores, owns, limits, rivals, rows, 4, to);
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
static ALWAYS_INLINE counts kept_lanes(const uint8_t *bits, int lanes)
{
    const counts bit = {1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11, 1 << 10, 1 << 9, 1 << 8,
                        1 << 7,  1 << 6,  1 << 5,  1 << 4,  1 << 3,  1 << 2,  1 << 1, 1};
    const int32_t both = bits[0] << 8 | (lanes > 8 ? bits[1] : 0);
    return (((counts){0} + both) & bit) != 0;
}

/* As f32_to_bf16, in the lower halves of the lanes. */
static ALWAYS_INLINE counts round_to_bf16(counts bits)
{
    typedef uint32_t words __attribute__((vector_size(SIDE * sizeof(uint32_t)))); /* those of NaN would overflow */
    const counts rounded = (counts)((words)bits + 0x7fff + ((words)bits >> 16 & 1));
    const counts nan = (bits & 0x7fffffff) > 0x7f800000;
    return ((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16;
}

static ALWAYS_INLINE void apply_row(const struct applying *job, int64_t row, const int32_t number)
{
    typedef uint16_t halves __attribute__((vector_size(SIDE * sizeof(uint16_t))));
    const float *weight = job->weight + row * job->row_stride;
    const uint8_t *bits = job->bits + row * ((job->width + 7) / 8);
    for (int64_t channel = 0; channel < job->width; channel += SIDE, bits += SIDE / 8) {
        const int lanes = job->width - channel < SIDE ? (int)(job->width - channel) : SIDE;
        const int64_t at = row * job->width + channel;
        const counts kept = (counts)load_some(weight + channel, lanes) & kept_lanes(bits, lanes);
        if (number == F32) {
            memcpy((float *)job->masked + at, &kept, (size_t)lanes * sizeof(float));
        } else {
            const halves rounded = __builtin_convertvector(round_to_bf16(kept), halves);
            memcpy((uint16_t *)job->masked + at, &rounded, (size_t)lanes * sizeof(uint16_t));
        }
    }
}

static void PASTE(NAME, _apply)(const void *applying, int64_t first, int64_t last)
{
    const struct applying *job = applying;
    for (int64_t row = first; row < last; row++)
        if (job->number == F32)
            apply_row(job, row, F32);
        else
            apply_row(job, row, BF16);
}

const struct search_kernels PASTE(NAME, _search) = {PASTE(NAME, _mask), PASTE(NAME, _keep), PASTE(NAME, _prune),
                                                   PASTE(NAME, _place), PASTE(NAME, _apply), PASTE(NAME, _step)};
