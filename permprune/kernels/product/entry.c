/* The functions for Python of packed weights: products and unpacking. */
#include "library.h"

/* ---- activations ---- */

static void read_floats(const struct weights *weights, const void *x, int64_t row, int32_t number, float *to)
{
    for (int64_t n = 0; n < weights->count; n++)
        read_block(weights, x, row, n, number, to + n * BLOCK);
}

static void read_pairs(const struct weights *weights, const uint16_t *x, int64_t row, uint16_t *to)
{
    x += row * weights->width;
    if (weights->order)
        for (int64_t c = 0; c < weights->width; c++)
            to[c] = x[weights->order[c]];
    else
        memcpy(to, x, (size_t)weights->width * sizeof *to);
    memset(to + weights->width, 0, (size_t)(weights->count * BLOCK - weights->width) * sizeof *to);
}

/* Writes row `row` of the activations, of type `number`, to `staged`. `line` has room for a row of floats. */
static void stage_row(const struct kernels *kernels, const struct weights *weights, const void *x, int64_t row,
                      int32_t number, int pairs, const struct staged *staged, void *line)
{
    int64_t first = row / TILE_BATCH * TILE_BATCH, left = staged->batch - first;
    int64_t height = left < TILE_BATCH ? left : TILE_BATCH, place = first * weights->count + (row - first);
    size_t size = (pairs ? 2 : 4) * BLOCK;
    if (pairs)
        read_pairs(weights, x, row, line);
    else
        read_floats(weights, x, row, number, line);
    if (are_integers(weights)) {
        kernels->stage_i8(line, weights->count, staged, place, height);
        return;
    }
    for (int64_t n = 0; n < weights->count; n++)
        memcpy((char *)staged->values + (size_t)(place + n * height) * size, (char *)line + (size_t)n * size, size);
}

/* ---- activations that are not finite ---- */

static int all_finite(const void *numbers, int64_t count, int32_t number)
{
    const uint16_t infinity = number == BF16 ? 0x7f80 : 0x7c00, *halves = numbers;
    const uint32_t *words = numbers;
    uint32_t bad = 0;
    uint16_t bad_halves = 0;
    if (number == F32)
        for (int64_t i = 0; i < count; i++)
            bad |= (words[i] & 0x7f800000) == 0x7f800000;
    else
        for (int64_t i = 0; i < count; i++)
            bad_halves |= (halves[i] & infinity) == infinity;
    return !bad && !bad_halves;
}

/* A weight, which is zero where it is pruned. */
static float weight_at(const struct weights *weights, int64_t row, int64_t channel)
{
    const int64_t n = row * weights->count + channel / BLOCK;
    const char *block = weights->blocks + n * block_bytes(weights), *values = block + header_bytes(weights);
    const int place = (int)(channel % BLOCK);
    int64_t slot = place;
    int is_turned = 0;
    if (weights->kind != PLAIN) {
        const uint64_t code = read_code(block), kept = kept_channels(code, weights->kind), is_kept = kept >> place & 1;
        is_turned = weights->kind == POSITIONS && turned(code) >> place / 4 * 4 & 1;
        slot = __builtin_popcountll(before(kept, place)) ^ is_turned;
        if (!is_kept || slot >= weights->slots)
            return 0.0f;
    }
    if (!are_integers(weights))
        return read_number(values, slot, weights->number);
    const float scale = weights->kind == PLAIN ? weights->scale[n] : read_scale(block, weights->number, place);
    if (weights->number == I8)
        return (float)(int8_t)values[slot] * scale;
    const int integer = ((uint8_t)values[slot / 2] >> slot % 2 * 4 & 15) - 8;
    return (float)(weights->kind == POSITIONS ? 2 * integer + is_turned : integer) * scale;
}

/* The products of a row of activations that are not all finite: only those count. Zeros are multiplied, too, as in the
 * dense product, whichever channels a kernel picks. `line` has room for the row. */
static void multiply_nonfinite(const struct product *job, const void *x, int64_t row, int32_t number, float *line)
{
    const struct weights *weights = job->weights;
    read_floats(weights, x, row, number, line);
    for (int64_t to = 0; to < weights->rows; to++) {
        float sum = 0;
        for (int64_t c = 0; c < weights->width && sum == sum; c++) /* NaN stays */
            if (!all_finite(line + c, 1, F32))
                sum += weight_at(weights, to, c) * line[c];
        write_output(job, row, to, sum);
    }
}

void correct_nonfinite(const struct product *job, const void *activations, int32_t number, float *line)
{
    const int64_t width = job->weights->width, row_bytes = width * (number == F32 ? 4 : 2);
    for (int64_t row = 0; row < job->staged->batch; row++)
        if (!all_finite((const char *)activations + row * row_bytes, width, number))
            multiply_nonfinite(job, activations, row, number, line);
}

static kernel *choose_kernel(const struct kernels *kernels, int32_t number, int pairs, int dense)
{
    if (pairs)
        return dense ? kernels->pairs->dense : kernels->pairs->product;
    return dense ? kernels->dense[number] : kernels->products[number];
}

/* ---- entries ---- */

int weights_are_bad(const struct weights *weights)
{
    const int64_t width = weights->width, slots = weights->slots;
    const int plain = weights->kind == PLAIN, positions = weights->kind == POSITIONS, number = weights->number;
    return bad_size(weights->rows) || bad_size(width) || weights->count != (width + BLOCK - 1) / BLOCK || slots < 1 ||
           slots > BLOCK || number < F32 || number > I4 || weights->kind < MASK || weights->kind > PLAIN ||
           (plain && (width % BLOCK || slots != BLOCK || weights->half || number == I4)) || (number == I4 && slots % 4) ||
           ((positions || weights->half) && slots < BLOCK / 2) || (positions && width % 4) ||
           (weights->bias && !is_float(weights->bias_number)) ||
           LACKS(weights->rows * width, weights->blocks) ||
           (plain && number == I8 && LACKS(weights->rows * width, weights->scale));
}

int32_t check_product(const struct weights *weights, const void *activations, int32_t number, int64_t batch, const void *output)
{
    if (weights_are_bad(weights) || bad_size(batch) || !is_float(number) || LACKS(batch * weights->width, activations) ||
        LACKS(batch * weights->rows, output))
        return BAD_SIZE;
    return weights->order && places_are_bad(weights->order, weights->width, weights->width) ? BAD_ORDER : DONE;
}

/* output (batch, rows) = activations (batch, width) x weight^T + bias, both contiguous in memory. The width of PLAIN
 * weights is a multiple of BLOCK. Returns a `status`. */
EXPORT int32_t permprune_multiply(const struct weights *weights, const void *activations, int32_t number, int64_t batch,
                                  void *output, int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    const int32_t status = check_product(weights, activations, number, batch, output);
    if (status != DONE)
        return status;
    int pairs = weights->number == BF16 && number == BF16 && runs_pairs(index);
    size_t channels = (size_t)(weights->count * BLOCK), places = (size_t)(batch * weights->count);
    size_t line = channels * sizeof(float), values = places * BLOCK * sizeof(float);
    char *memory = aligned_alloc(64, line + values + (places * sizeof(float) + 63) / 64 * 64);
    if (!memory)
        return NO_MEMORY;
    struct staged staged = {memory + line, (float *)(memory + line + values), batch};
    for (int64_t row = 0; row < batch; row++)
        stage_row(kernels, weights, activations, row, number, pairs, &staged, memory);
    struct product job = {weights, &staged, output, number};
    kernel *function = choose_kernel(kernels, weights->number, pairs, weights->kind == PLAIN);
    run_in_pieces(&job, function, weights->rows, TILE_ROWS, threads);
    correct_nonfinite(&job, activations, number, (float *)memory);
    free(memory);
    return DONE;
}

/* output (last - first, width) = rows `first` to `last` of the weight with its zeros, which is not of PLAIN floats.
 * Returns a `status`. */
EXPORT int32_t permprune_unpack(const struct weights *weights, int64_t first, int64_t last, void *output, int32_t number,
                                int32_t index, int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    const int plain = weights->kind == PLAIN;
    if (weights_are_bad(weights) || (plain && weights->number != I8) || !is_float(number) || first < 0 ||
        last < first || last > weights->rows || LACKS((last - first) * weights->width, output))
        return BAD_SIZE;
    struct weights some = *weights;
    some.rows = last - first;
    some.blocks += first * weights->count * (plain ? BLOCK : block_bytes(weights));
    if (plain)
        some.scale += first * weights->count;
    struct product job = {&some, NULL, output, number};
    run_in_pieces(&job, kernels->unpack[some.number], some.rows, TILE_ROWS, threads);
    return DONE;
}
