/* The kernels of elementwise.h, inside BEGIN_TARGET and END_TARGET, after those of adam and attention. */

typedef uint16_t half_lanes __attribute__((vector_size(LINE * sizeof(uint16_t))));
typedef uint32_t uint_lanes __attribute__((vector_size(LINE * sizeof(uint32_t))));

static ALWAYS_INLINE void store_numbers(void *numbers, int64_t offset, lanes line, const int32_t number)
{
    if (number == F32) {
        store_line((float *)numbers + offset, line);
        return;
    }
    /* Halves are rounded away from 0, which takes half the time of rounding them to even; no NaN that comes of numbers of
     * 16 bits has bits that could carry. */
    const half_lanes halves = __builtin_convertvector(((uint_lanes)line + 0x8000) >> 16, half_lanes);
    memcpy((uint16_t *)numbers + offset, &halves, sizeof halves);
}

/* ---- activation functions ---- */

enum { LINEAR, CUBIC, NORMAL }; /* forms of activation functions */

#if !defined(HAS_RECIPROCAL)
/* 1 / x for x from 1 to 2, with a relative error of at most 2e-4 unless it is `exact`. */
static ALWAYS_INLINE lanes reciprocal(lanes x, const int exact)
{
    (void)exact;
    return 1.0f / x;
}
#endif

static ALWAYS_INLINE lanes polynomial(lanes x, const float *terms, const int count)
{
    lanes sum = spread(terms[count - 1]);
    UNROLLED for (int i = count - 2; i >= 0; i--) sum = sum * x + terms[i];
    return sum;
}

/* 2^-x for x >= 0, with a relative error of 2e-7, or 1e-4 unless it is `exact`. */
static ALWAYS_INLINE lanes power_of_half(lanes x, const int exact)
{
    static const float six[] = {1.0f, 0.693146944f, 0.240221202f, 0.055507131f, 0.00967554189f, 0.00132764829f};
    static const float four[] = {0.999928057f, 0.693260968f, 0.242611125f, 0.0551717356f};
    const lanes moved = 12582912.0f - x; /* 1.5 x 2^23: the lowest bits are the nearest integer */
    const lanes rest = (12582912.0f - moved) - x;
    const lanes part = exact ? polynomial(rest, six, 6) : polynomial(rest, four, 4);
    const lanes power = (lanes)(((int_lanes)moved << 23) + 0x3f800000);
    return (lanes)((int_lanes)(part * power) & ~(int_lanes)(x > 126.0f));
}

/* x times the normal distribution function, by a polynomial for x from -4 to 4: with an absolute error of 6e-5, from -3 on a
 * relative one of 4e-4, a tenth of a bit of bf16; and 0 below -4. */
static ALWAYS_INLINE lanes activate_normal(lanes x)
{
    static const float terms[] = {0.398631245f,     -0.0659307837f,  0.00959196407f, -0.00104855455f, 8.44090537e-05f,
                                  -4.8329025e-06f, 1.84921802e-07f, -4.21176338e-09f, 4.29659294e-11f};
    const lanes above = select_lanes(x < -4.0f, spread(-4.0f), x), within = select_lanes(above > 4.0f, spread(4.0f), above);
    const lanes share = within * polynomial(within * within, terms, 9) + 0.5f;
    return x * (lanes)((int_lanes)share & ~(int_lanes)(x < -4.0f));
}

/* Powers are those of 2, of the size of x, so that they are at most 1. */
static ALWAYS_INLINE lanes activate_line(lanes x, float linear, float cubic, const int form, const int exact)
{
    if (form == NORMAL)
        return activate_normal(x);
    const lanes size = (lanes)((int_lanes)x & INT32_MAX);
    const lanes small = power_of_half(size * (form == CUBIC ? linear + cubic * (x * x) : spread(linear)), exact);
    return x * select_lanes(x < 0.0f, small, spread(1.0f)) * reciprocal(1.0f + small, exact);
}

static ALWAYS_INLINE void activate_block(const struct activate *job, int64_t i, int64_t last, const int form,
                                         const int32_t number)
{
    const float linear = job->linear * 1.44269504f, cubic = job->cubic * 1.44269504f;
    const int exact = number == F32;
    for (; i + LINE <= last; i += LINE)
        store_numbers(job->y, i, activate_line(read_numbers(job->x, i, LINE, number), linear, cubic, form, exact), number);
    for (; i < last; i++) {
        const lanes x = spread(read_number(job->x, i, number));
        write_number(job->y, i, number, activate_line(x, linear, cubic, form, exact)[0]);
    }
}

static void activate_blocks(const void *argument, int64_t first, int64_t last)
{
    const struct activate *job = argument;
    first *= ACTIVATED;
    last = smaller(last * ACTIVATED, job->count);
    const int form = job->normal ? NORMAL : job->cubic == 0.0f ? LINEAR : CUBIC;
    if (form == NORMAL)
        activate_block(job, first, last, NORMAL, BF16);
    else if (form == LINEAR && job->number == BF16)
        activate_block(job, first, last, LINEAR, BF16);
    else if (form == LINEAR)
        activate_block(job, first, last, LINEAR, F32);
    else if (job->number == BF16)
        activate_block(job, first, last, CUBIC, BF16);
    else
        activate_block(job, first, last, CUBIC, F32);
}

/* ---- RMS norms ---- */

static ALWAYS_INLINE void normalize_row(const struct normalize *job, int64_t row, const int32_t number)
{
    const int64_t width = job->width, whole = width / LINE * LINE, first = row * width;
    lanes sums[2] = {{0}, {0}};
    for (int64_t i = 0; i < whole; i += LINE) {
        const lanes x = read_numbers(job->x, first + i, LINE, number);
        sums[i / LINE & 1] += x * x;
    }
    float total = 0;
    for (int i = 0; i < LINE; i++)
        total += sums[0][i] + sums[1][i];
    for (int64_t i = whole; i < width; i++) {
        const float x = read_number(job->x, first + i, number);
        total += x * x;
    }
    const float scale = 1.0f / sqrtf(total / (float)width + job->least);
    for (int64_t i = 0; i < whole; i += LINE) {
        const lanes weight = read_numbers(job->weight, i, LINE, number) + job->shift;
        store_numbers(job->y, first + i, read_numbers(job->x, first + i, LINE, number) * scale * weight, number);
    }
    for (int64_t i = whole; i < width; i++) {
        const float weight = read_number(job->weight, i, number) + job->shift;
        write_number(job->y, first + i, number, read_number(job->x, first + i, number) * scale * weight);
    }
}

static void normalize_rows(const void *argument, int64_t first, int64_t last)
{
    const struct normalize *job = argument;
    for (int64_t row = first; row < last; row++)
        if (job->number == F32)
            normalize_row(job, row, F32);
        else
            normalize_row(job, row, BF16);
}
