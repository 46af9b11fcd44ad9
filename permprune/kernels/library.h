/* What the functions for Python share: the kernels that run here, threads, and checks of what a job says. */
#ifndef PERMPRUNE_LIBRARY_H
#define PERMPRUNE_LIBRARY_H
#include "adam/adam.h"
#include "attention/attention.h"
#include "elementwise/elementwise.h"
#include "numbers.h"
#include "product/packed.h"
#include "search/search.h"

#define EXPORT __attribute__((visibility("default")))

enum status { DONE, NO_MEMORY, NO_KERNEL, BAD_ORDER, BAD_CODE, BAD_SIZE }; /* see `REASONS` in library.py */

/* Works on the items `first` to `last` of a job. */
typedef void kernel(const void *job, int64_t first, int64_t last);

/* Those of an instruction that multiplies pairs of bf16: `product` and `dense` multiply bf16 by bf16, and `many` many rows of
 * activations by 2:4 weights of bf16 or integers, after `turn`. */
struct pair_kernels {
    kernel *product, *dense; /* of rows of the weight */
    kernel *turn, *many;     /* of tiles of tokens; of (tiles, chunks of rows): see product/many_pairs.h */
};

/* Those of matrix units for bf16. */
struct tile_kernels {
    kernel *lay_out, *many; /* of groups of tokens; of shares of the rows: see product/many_tiles.h */
    kernel *attend;         /* of (batch, heads of the queries) */
};

/* The kernels of one instruction set.
 *
 * Products are by the type of the weight: `products`; `dense`, the same for PLAIN weights; and `unpack`, which writes the
 * weight with its zeros, (rows, width). `spread` and `many` multiply many rows of activations. `stage_i8` rounds a row of
 * activations for int8 weights (product/family_i8.h). */
struct kernels {
    const char *name;
    int (*runs_here)(void); /* NULL where they always do */
    void (*stage_i8)(const float *line, int64_t count, const struct staged *staged, int64_t place, int64_t apart);
    kernel *products[STORED], *dense[NUMBERS], *unpack[STORED]; /* of rows of the weight */
    kernel *spread, *many; /* of tiles of tokens; of chunks of rows: see product/many.h */
    int64_t lanes, vectors; /* numbers of a vector, and the most vectors of a tile */
    int (*pairs_run_here)(void);
    const struct pair_kernels *pairs; /* NULL where there are no such instructions */
    const struct tile_kernels *tiles; /* the same */
    kernel *mask, *keep, *apply, *step;         /* of rows */
    kernel *square;                             /* of blocks of channels */
    kernel *prune;                              /* of groups */
    int (*place)(const struct place *place);    /* 0 when there is no memory */
    kernel *attend;                             /* of (batch, heads, parts) */
    kernel *combine, *unpack_states; /* of (batch, heads) */
    kernel *activate, *normalize; /* of blocks of numbers; of rows */
};

/* What the headers of all families define for each instruction set. */
#define ALL_KERNELS                                                                                                    \
    .stage_i8 = stage_i8,                                                                                              \
    .products = {[F32] = product_f32, [BF16] = product_bf16, [F16] = product_f16, [I8] = product_i8,                   \
                 [I4] = product_i4},                                                                                   \
    .dense = {[F32] = dense_f32, [BF16] = dense_bf16, [F16] = dense_f16, [I8] = dense_i8},                             \
    .unpack = {[F32] = unpack_f32, [BF16] = unpack_bf16, [F16] = unpack_f16, [I8] = unpack_i8, [I4] = unpack_i4},      \
    .spread = spread_tokens, .many = multiply_tokens, .lanes = LANES, .vectors = MOST_VECTORS,                        \
    .mask = mask_rows, .keep = keep_rows, .apply = apply_rows, .step = step_rows, .square = square_blocks,             \
    .prune = prune_groups, .place = place_channels, .attend = attend, .combine = combine, .unpack_states = unpack_states, \
    .activate = activate_blocks, .normalize = normalize_rows

extern const struct kernels amx_kernels, avx512_kernels, avx2_kernels, neon_kernels, portable_kernels;
extern const struct pair_kernels avx512_pairs;
extern const struct tile_kernels amx_tiles;

/* Kernels number `index`, the best first; NULL if they do not run here, or do not exist. */
const struct kernels *find_kernels(int32_t index);

/* Whether products of pairs of bf16 numbers run here. */
int runs_pairs(int32_t index);

/* Runs `function` on `count` items, in pieces of whole units, such as the rows of a tile: the result does not depend on
 * the threads. */
void run_in_pieces(const void *job, kernel *function, int64_t count, int64_t unit, int32_t threads);

/* Defines `permprune_NAME(job, index, threads)`, which runs a `struct NAME` with kernels number `index` and returns a
 * `status`. What the job says is checked before a kernel runs: sizes, types, and places; not the memory behind its
 * pointers. */
#define ENTRY(NAME)                                                                                                    \
    static int32_t run_##NAME(const struct NAME *job, const struct kernels *kernels, int32_t threads);                 \
    EXPORT int32_t permprune_##NAME(const struct NAME *job, int32_t index, int32_t threads)                            \
    {                                                                                                                  \
        const struct kernels *kernels = find_kernels(index);                                                           \
        return kernels ? run_##NAME(job, kernels, threads) : NO_KERNEL;                                                \
    }                                                                                                                  \
    static int32_t run_##NAME(const struct NAME *job, const struct kernels *kernels, int32_t threads)

enum { MOST = 1 << 28 }; /* the largest size of anything that is squared, or multiplied by another size */

/* Whether a size is negative or too large. */
static inline int bad_size(int64_t size) { return size < 0 || size > MOST; }

static inline int is_float(int32_t number) { return number >= F32 && number <= F16; }

/* Whether there is work, and one of its pointers is NULL. */
#define LACKS(work, ...) lacks(work, (const void *const[]){__VA_ARGS__, (void *)1}) /* the 1 is the last */

static inline int lacks(int64_t work, const void *const *pointers)
{
    while (work && *pointers && *pointers != (void *)1)
        pointers++;
    return work && !*pointers;
}

/* Whether some places are outside of [0, limit). */
int places_are_bad(const int64_t *places, int64_t count, int64_t limit);

#endif
