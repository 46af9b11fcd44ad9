/* The functions for Python: the names of the kernels, products, checks of masks, unpacking, and the inner loops of the
 * search. */
#include "cache.h"
#include "packed.h"
#include "search.h"
#include <stdatomic.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

enum status { DONE, NO_MEMORY, NO_KERNEL, BAD_ORDER, BAD_CODE };

static const struct kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &avx512_kernels, &avx2_kernels,
#elif defined(__aarch64__)
    &neon_kernels,
#endif
    &portable_kernels,
};
enum { KERNELS = sizeof all_kernels / sizeof *all_kernels };

/* Whether kernels run here. The answer is kept: in a virtual machine each look at the processor's features traps. */
static int answer(_Atomic signed char *kept, int (*question)(void))
{
    signed char found = *kept;
    if (!found)
        *kept = found = question() ? 1 : -1;
    return found > 0;
}

static int runs(int32_t index)
{
    static _Atomic signed char kept[KERNELS];
    return index >= 0 && index < KERNELS && answer(&kept[index], all_kernels[index]->runs_here);
}

static int runs_pairs(int32_t index)
{
    static _Atomic signed char kept[KERNELS];
    return all_kernels[index]->pairs && answer(&kept[index], all_kernels[index]->pairs_run_here);
}

/* ---- threads: those of the OpenMP runtime that torch has loaded; a second pool would compete for the cores ---- */

typedef void parallel_region(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_region *parallel;

typedef void piece_kernel(const void *job, int64_t first, int64_t last);

struct pieces {
    const void *job;
    piece_kernel *kernel;
    int64_t last, piece;
    _Atomic int64_t next;
};

static void take_pieces(void *data)
{
    struct pieces *pieces = data;
    for (;;) {
        int64_t first = atomic_fetch_add(&pieces->next, pieces->piece);
        if (first >= pieces->last)
            return;
        int64_t stop = first + pieces->piece;
        pieces->kernel(pieces->job, first, stop < pieces->last ? stop : pieces->last);
    }
}

/* Pieces are whole units, such as the rows of a tile, so that the result does not depend on the threads. */
static void deal(const void *job, piece_kernel *kernel, int64_t count, int64_t unit, int32_t threads)
{
    if (threads <= 1 || !parallel) {
        kernel(job, 0, count);
        return;
    }
    int64_t piece = count / (threads * 4) / unit * unit;
    struct pieces pieces = {job, kernel, count, piece < unit ? unit : piece, 0};
    parallel(take_pieces, &pieces, (unsigned)threads, 0);
}

static void deal_rows(const void *job, piece_kernel *kernel, int64_t count, int32_t threads)
{
    deal(job, kernel, count, TILE_ROWS, threads);
}

struct product {
    const struct job *job;
    rows_kernel *kernel;
};

static void multiply_piece(const void *product, int64_t first, int64_t last)
{
    const struct product *own = product;
    own->kernel(own->job, first, last);
}

EXPORT void permprune_use_threads_of(void *gomp_parallel) { parallel = (parallel_region *)gomp_parallel; }

/* ---- activations ---- */

static ALWAYS_INLINE void read_row(const struct weights *weights, const void *x, int64_t row, int32_t number, float *to)
{
    const int64_t first = row * weights->width;
    if (weights->order)
        for (int64_t c = 0; c < weights->width; c++)
            to[c] = read_number(x, first + weights->order[c], number);
    else
        for (int64_t c = 0; c < weights->width; c++)
            to[c] = read_number(x, first + c, number);
    memset(to + weights->width, 0, (size_t)(weights->count * BLOCK - weights->width) * sizeof *to);
}

static void read_floats(const struct weights *weights, const void *x, int64_t row, int32_t number, float *to)
{
    switch (number) { /* a separate loop for each type */
    case F32: read_row(weights, x, row, F32, to); break;
    case BF16: read_row(weights, x, row, BF16, to); break;
    default: read_row(weights, x, row, F16, to);
    }
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
    if (weights->number == I8) {
        kernels->stage_i8(line, weights->count, staged, place, height);
        return;
    }
    for (int64_t n = 0; n < weights->count; n++)
        memcpy((char *)staged->values + (size_t)(place + n * height) * size, (char *)line + (size_t)n * size, size);
}

static int order_is_bad(const struct weights *weights)
{
    uint64_t bad = 0;
    if (weights->order)
        for (int64_t c = 0; c < weights->width; c++)
            bad |= (uint64_t)weights->order[c] >= (uint64_t)weights->width;
    return bad != 0;
}

static rows_kernel *choose_kernel(const struct kernels *kernels, int32_t number, int pairs, int dense)
{
    if (pairs)
        return dense ? kernels->dense_pairs : kernels->pairs;
    return dense ? kernels->dense[number] : kernels->products[number];
}

/* ---- entries ---- */

/* The name of kernels number `index`, the best first; "" if they do not run here, NULL after the last. */
EXPORT const char *permprune_kernels(int32_t index)
{
    if (index < 0 || index >= KERNELS)
        return NULL;
    return runs(index) ? all_kernels[index]->name : "";
}

/* output (batch, rows) = activations (batch, width) x weight^T + bias, both contiguous in memory. The width of PLAIN
 * weights is a multiple of BLOCK. Returns a `status`. */
EXPORT int32_t permprune_multiply(const struct weights *weights, const void *activations, int32_t number, int64_t batch,
                                  void *output, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    const struct kernels *kernels = all_kernels[index];
    int dense = weights->kind == PLAIN;
    int pairs = weights->number == BF16 && number == BF16 && runs_pairs(index);
    if (order_is_bad(weights))
        return BAD_ORDER;
    size_t channels = (size_t)(weights->count * BLOCK), places = (size_t)(batch * weights->count);
    size_t line = channels * sizeof(float), values = places * BLOCK * sizeof(float);
    char *memory = aligned_alloc(64, line + values + (places * 2 * sizeof(float) + 63) / 64 * 64);
    if (!memory)
        return NO_MEMORY;
    float *scale = (float *)(memory + line + values);
    struct staged staged = {memory + line, scale, (int32_t *)(scale + places), batch};
    for (int64_t row = 0; row < batch; row++)
        stage_row(kernels, weights, activations, row, number, pairs, &staged, memory);
    struct job job = {weights, &staged, output, number};
    struct product product = {&job, choose_kernel(kernels, weights->number, pairs, dense)};
    deal_rows(&product, multiply_piece, weights->rows, threads);
    free(memory);
    return DONE;
}

/* Whether the mask of the channels of some blocks keeps exactly n of every m of the first `width`, and no others. */
static int keeps_pattern(const struct weights *weights, const char *block, int32_t n, int32_t m)
{
    const int64_t size = block_bytes(weights);
    uint32_t bad = 0;
    uint64_t waiting = 0; /* the mask of `count` channels that are read but not yet counted */
    int count = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < weights->count * CODE; i++) {
        int64_t left = weights->width - i / CODE * BLOCK;
        uint64_t mask = kept_channels(read_code(block + i / CODE * size), weights->kind);
        if (weights->kind == POSITIONS && left < BLOCK)
            mask = before(mask, (int)left); /* the groups after the width keep two channels each, of zeros */
        waiting |= (mask >> i % CODE * 8 & 255) << count;
        for (count += 8; count >= m && counted < weights->width; count -= m, counted += m, waiting >>= m)
            bad |= __builtin_popcountll(before(waiting, m)) != n;
        if (counted == weights->width) {
            bad |= waiting != 0;
            waiting = 0;
            count = 0;
        }
    }
    return !bad;
}

/* Whether the positions of every group ascend, and are 0 and 1 after the width. */
static int positions_ascend(const struct weights *weights, const char *block)
{
    const int64_t size = block_bytes(weights);
    int bad = 0;
    for (int64_t group = 0; group < weights->count * (BLOCK / 4); group++) {
        int pair = (int)(read_code(block + group / (BLOCK / 4) * size) >> group % (BLOCK / 4) * 4 & 15);
        bad |= (pair & 3) >= pair >> 2 || (group * 4 >= weights->width && pair != 4);
    }
    return !bad;
}

/* The first row whose codes do not keep exactly n of every m channels; -1 if there is none. */
EXPORT int64_t permprune_check(const struct weights *weights, int32_t n, int32_t m)
{
    const char *block = weights->blocks;
    for (int64_t row = 0; row < weights->rows; row++, block += weights->count * block_bytes(weights))
        if (!keeps_pattern(weights, block, n, m) || (weights->kind == POSITIONS && !positions_ascend(weights, block)))
            return row;
    return -1;
}

/* output (last - first, width) = rows `first` to `last` of the weight with its zeros. Returns a `status`. */
EXPORT int32_t permprune_unpack(const struct weights *weights, int64_t first, int64_t last, void *output, int32_t number,
                                int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    struct weights some = *weights;
    some.rows = last - first;
    some.blocks += first * weights->count * block_bytes(weights);
    struct job job = {&some, NULL, output, number};
    struct product product = {&job, all_kernels[index]->unpack[some.number]};
    deal_rows(&product, multiply_piece, some.rows, threads);
    return DONE;
}

/* ---- the search ---- */

static int places_are_bad(const int64_t *places, int64_t count, int64_t limit)
{
    uint64_t bad = 0;
    for (int64_t i = 0; i < count; i++)
        bad |= (uint64_t)places[i] >= (uint64_t)limit;
    return bad != 0;
}

static int masking_is_bad(const struct masking *masking)
{
    const int m = masking->m;
    return m < 1 || m > LARGEST_M || masking->size % m || places_are_bad(masking->places, masking->size, masking->width);
}

/* Write the mask of some columns in their order. Returns a `status`. */
EXPORT int32_t permprune_mask(const struct masking *masking, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    if (masking_is_bad(masking))
        return BAD_ORDER;
    deal_rows(masking, all_kernels[index]->search->mask, masking->rows, threads);
    return DONE;
}

/* Add up, by row, the kept weights times their gradients. Returns a `status`. */
EXPORT int32_t permprune_keep(const struct keeping *keeping, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    if (masking_is_bad(&keeping->masking))
        return BAD_ORDER;
    deal_rows(keeping, all_kernels[index]->search->keep, keeping->masking.rows, threads);
    return DONE;
}

/* Write the pruned weights of all groups. Returns a `status`. */
EXPORT int32_t permprune_prune(const struct pruning *pruning, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    const int64_t count = pruning->count, m = pruning->m;
    if (m < 2 || m > LARGEST_M || pruning->n < 1 || pruning->n >= m ||
        places_are_bad(pruning->groups, count * m, pruning->channels))
        return BAD_ORDER;
    deal_rows(pruning, all_kernels[index]->search->prune, count, threads);
    return DONE;
}

/* Add to `cost` what it costs to move the free channel of each group to each group. Returns a `status`. */
EXPORT int32_t permprune_place(const struct placement *placement, int32_t index)
{
    if (!runs(index))
        return NO_KERNEL;
    const int64_t count = placement->count, m = placement->m;
    if (m < 2 || m > LARGEST_M || placement->n < 1 || placement->n >= m ||
        places_are_bad(placement->slots, count, m) ||
        places_are_bad(placement->groups, count * m, placement->channels))
        return BAD_ORDER;
    return all_kernels[index]->search->place(placement) ? DONE : NO_MEMORY;
}

/* Write a weight with zeros where a mask has none. Returns a `status`. */
EXPORT int32_t permprune_apply(const struct applying *applying, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    deal_rows(applying, all_kernels[index]->search->apply, applying->rows, threads);
    return DONE;
}

/* Update the kept weights and their moments. Returns a `status`. */
EXPORT int32_t permprune_step(const struct stepping *stepping, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    deal_rows(stepping, all_kernels[index]->search->step, stepping->rows, threads);
    return DONE;
}

/* ---- the pruned cache ---- */

static int states_are_bad(const struct states *states)
{
    return states->width < 1 || states->width > WIDEST || states->kept < 0 || states->kept > states->width ||
           (states->kind == EVERY && states->kept != states->width);
}

/* The output of attention, (batch, count, heads * group, width). Returns a `status`. */
EXPORT int32_t permprune_attend(const struct attention *attention, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    struct attention job = *attention;
    int32_t bad = 0;
    job.bad = &bad;
    for (int side = 0; side < 2; side++) {
        const int64_t width = job.packed[side].width;
        if (states_are_bad(&job.packed[side]) || states_are_bad(&job.whole[side]))
            return BAD_CODE;
        for (int64_t head = 0; head < job.heads; head++)
            if (places_are_bad(job.order[side] + head * width, width, width))
                return BAD_ORDER;
    }
    deal(&job, all_kernels[index]->cache->attend, job.batch * job.heads * job.parts, 1, threads);
    deal(&job, all_kernels[index]->cache->combine, job.batch * job.heads, 1, 1);
    return bad ? BAD_CODE : DONE;
}

/* Some packed tokens as numbers, (batch * heads, count, width). Returns a `status`. */
EXPORT int32_t permprune_unpack_states(const struct unpacking *unpacking, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    struct unpacking job = *unpacking;
    int32_t bad = 0;
    job.bad = &bad;
    if (states_are_bad(&job.states))
        return BAD_CODE;
    deal(&job, all_kernels[index]->cache->unpack, job.batch * job.heads, 1, threads);
    return bad ? BAD_CODE : DONE;
}

/* Pack states. Returns a `status`. */
EXPORT int32_t permprune_pack_states(const struct packing *packing, int32_t index, int32_t threads)
{
    if (!runs(index))
        return NO_KERNEL;
    const struct states *states = &packing->states;
    const int64_t n = packing->n, m = packing->m;
    if (states_are_bad(states) || states->kind == EVERY || n < 1 || n >= m || states->width % m ||
        states->kept != states->width / m * n || (states->kind != BITS && (m != 4 || n != states->kind - ONE_OF_4 + 1)))
        return BAD_CODE;
    deal(packing, all_kernels[index]->cache->pack, packing->batch * packing->heads, 1, threads);
    return DONE;
}
