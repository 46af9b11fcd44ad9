/* The kernels of adam.h, inside BEGIN_TARGET and END_TARGET; for any processor; `step_row` unless HAS_STEP_ROW
 * is defined. */

#if !defined(HAS_STEP_ROW)
enum { SPAN = 64 }; /* channels that are worked on together */

/* The same 16 random bits for a weight and a step, in whatever order weights are worked on (the finalizer of
 * MurmurHash3 by Austin Appleby, which is in the public domain). */
static ALWAYS_INLINE uint32_t noise(uint32_t seed, uint32_t index)
{
    uint32_t bits = seed + index * 0x9e3779b9u;
    bits = (bits ^ bits >> 16) * 0x85ebca6bu;
    bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
    return (bits ^ bits >> 16) & 0xffff;
}

/* The lanes of the kept channels among `lanes` from `channel` on, at most SPAN, and how many they are; `bits` are those of
 * the row. */
static ALWAYS_INLINE int kept_of_span(const uint8_t *bits, int64_t channel, int lanes, uint8_t *lane)
{
    uint64_t left = 0;
    for (int i = 0; i < lanes; i += 8)
        left |= (uint64_t)bits[(channel + i) / 8] << (56 - i);
    if (lanes < SPAN)
        left &= ~(UINT64_MAX >> lanes);
    int count = 0;
    for (; left; left &= ~(UINT64_C(1) << 63 >> lane[count - 1]))
        lane[count++] = (uint8_t)__builtin_clzll(left);
    return count;
}

/* `count` numbers as fp32; the other lanes keep what they have. */
static ALWAYS_INLINE void read_span(const void *numbers, int64_t offset, int count, const int32_t number, float *span)
{
    if (number == F32) {
        memcpy(span, (const float *)numbers + offset, (size_t)count * sizeof(float));
        return;
    }
    uint16_t halves[SPAN] = {0};
    memcpy(halves, (const uint16_t *)numbers + offset, (size_t)count * sizeof(uint16_t));
    for (int i = 0; i < SPAN; i++)
        span[i] = bf16_to_f32(halves[i]);
}

static ALWAYS_INLINE void write_span(void *numbers, int64_t offset, int count, const int32_t number, const float *span)
{
    if (number == F32) {
        memcpy((float *)numbers + offset, span, (size_t)count * sizeof(float));
        return;
    }
    uint16_t halves[SPAN];
    for (int i = 0; i < SPAN; i++)
        halves[i] = (uint16_t)((to_bits(span[i]) + 0x7fff + (to_bits(span[i]) >> 16 & 1)) >> 16);
    memcpy((uint16_t *)numbers + offset, halves, (size_t)count * sizeof(uint16_t));
}

static ALWAYS_INLINE void step_span(const struct step *job, float by_row, const float *by_channel, float *weight,
                                    const float *gradient, float *mean)
{
    const float first = job->first, rate = job->rate, least = job->least;
    for (int i = 0; i < SPAN; i++) {
        mean[i] = first * mean[i] + (1 - first) * gradient[i];
        weight[i] -= rate * mean[i] / (by_row * by_channel[i] + least);
    }
}

/* Round the weights to bf16 stochastically; those that are not finite stay what they are. */
static ALWAYS_INLINE void round_span(const float *weight, uint32_t seed, uint32_t slot, uint16_t *rounded)
{
    for (int i = 0; i < SPAN; i++) {
        const uint32_t bits = to_bits(weight[i]), finite = (bits & 0x7f800000) != 0x7f800000;
        rounded[i] = (uint16_t)((bits + finite * noise(seed, slot + (uint32_t)i)) >> 16);
    }
}

static ALWAYS_INLINE void step_row(const struct step *job, int64_t row, const int32_t number)
{
    const uint8_t *bits = job->bits + row * ((job->width + 7) / 8);
    float weight[SPAN] = {0}, gradient[SPAN] = {0}, mean[SPAN] = {0}, by_channel[SPAN] = {0};
    int64_t slot = row * job->kept;
    const int64_t end = slot + job->kept;
    for (int64_t channel = 0; channel < job->width; channel += SPAN) {
        const int64_t offset = row * job->width + channel;
        uint8_t lane[SPAN];
        uint16_t rounded[SPAN];
        int count = kept_of_span(bits, channel, job->width - channel < SPAN ? (int)(job->width - channel) : SPAN, lane);
        if (count > end - slot) /* more bits than moments: the rest stays as it is */
            count = (int)(end - slot);
        for (int i = 0; i < count; i++) {
            weight[i] = read_number(job->weight, offset + lane[i], number);
            gradient[i] = read_number(job->gradient, offset + lane[i], number);
            by_channel[i] = job->by_channel[channel + lane[i]];
        }
        read_span(job->mean, slot, count, number, mean);
        step_span(job, job->by_row[row], by_channel, weight, gradient, mean);
        write_span(job->mean, slot, count, number, mean);
        if (number == BF16)
            round_span(weight, job->seed, (uint32_t)slot, rounded);
        for (int i = 0; i < count; i++)
            if (number == F32)
                ((float *)job->weight)[offset + lane[i]] = weight[i];
            else
                ((uint16_t *)job->weight)[offset + lane[i]] = rounded[i];
        slot += count;
    }
}
#endif

static void step_rows(const void *argument, int64_t first, int64_t last)
{
    const struct step *job = argument;
    for (int64_t row = first; row < last; row++)
        if (job->number == F32)
            step_row(job, row, F32);
        else
            step_row(job, row, BF16);
}

/* `count` numbers, at most LINE; the other lanes are 0. */
static ALWAYS_INLINE lanes read_numbers(const void *numbers, int64_t offset, int64_t count, const int32_t number)
{
    typedef uint16_t short_lanes __attribute__((vector_size(LINE * sizeof(uint16_t))));
    if (number == F32)
        return load_some((const float *)numbers + offset, (int)count);
    short_lanes halves = {0};
    memcpy(&halves, (const uint16_t *)numbers + offset, (size_t)(count == LINE ? LINE : count) * sizeof(uint16_t));
    return (lanes)(__builtin_convertvector(halves, int_lanes) << 16);
}

static ALWAYS_INLINE void square_line(const struct square *job, int64_t offset, const uint8_t *bits, int64_t count,
                                      lanes *by_channel, lanes *by_lane, const int32_t number)
{
    const int_lanes keep = kept_lanes(bits, (int)count);
    const lanes kept = (lanes)((int_lanes)read_numbers(job->gradient, offset, count, number) & keep), squares = kept * kept;
    *by_channel += squares;
    *by_lane += squares;
}

static ALWAYS_INLINE void square_block(const struct square *job, int64_t block, const int32_t number)
{
    const int64_t first = block * SQUARED, width = smaller(SQUARED, job->width - first), bytes = (job->width + 7) / 8;
    lanes by_channel[SQUARED / LINE] = {{0}};
    for (int64_t row = 0; row < job->rows; row++) {
        const uint8_t *bits = job->bits + row * bytes + first / 8;
        const int64_t offset = row * job->width + first, whole = width / LINE;
        lanes by_lane = {0};
        for (int64_t line = 0; line < whole; line++)
            square_line(job, offset + line * LINE, bits + 2 * line, LINE, &by_channel[line], &by_lane, number);
        if (whole * LINE < width)
            square_line(job, offset + whole * LINE, bits + 2 * whole, width % LINE, &by_channel[whole], &by_lane, number);
        float sum = 0;
        for (int i = 0; i < LINE; i++)
            sum += by_lane[i];
        job->by_row[block * job->rows + row] = sum;
    }
    memcpy(job->by_channel + first, by_channel, (size_t)width * sizeof(float));
}

static void square_blocks(const void *argument, int64_t first, int64_t last)
{
    const struct square *job = argument;
    for (int64_t block = first; block < last; block++)
        if (job->number == F32)
            square_block(job, block, F32);
        else
            square_block(job, block, BF16);
}
