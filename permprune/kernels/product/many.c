/* The functions for Python of products of many rows of activations: which kernel multiplies, and what at a time. */
#include "library.h"

/* Whether a product may be one of bf16. Beside integers, activations in fp32 are rounded, too. */
static int are_bf16(const struct weights *weights, int32_t number)
{
    return are_integers(weights) ? number == BF16 || number == F32 : number == BF16 && weights->number == BF16;
}

/* Whether many_pairs.h multiplies these. */
static int are_pairs(const struct weights *weights, int32_t number, int32_t index)
{
    return are_bf16(weights, number) && weights->kind == POSITIONS && runs_pairs(index);
}

/* Whether many_tiles.h multiplies these: floats, in parts of bf16, and integers, whose values are rounded to it, as the activations
 * beside them. */
static int are_tiles(const struct weights *weights, int32_t number, int32_t index)
{
    const int integers = are_integers(weights), fits = integers ? are_bf16(weights, number) : weights->kind != PLAIN;
    return fits && find_kernels(index)->tiles;
}

/* The numbers in bf16 of a token. */
static int64_t token_numbers(const struct weights *weights, int32_t number)
{
    return weights->count * BLOCK * token_parts(weights, number);
}

enum { FEW_TOKENS = 128 }; /* whose products take about as long as unpacking the weight */

/* The tokens that matrix units multiply at a time: if half of them leave their tiles in half of a level 2 cache of 2 MiB, and all
 * do not, half of them. For wider ones the weight would have to be unpacked too often. */
static int64_t tokens_of_tiles(const struct weights *weights, int32_t number, int64_t batch)
{
    enum { ALL = 512, LEAST_WIDTH = 1024 };
    const int64_t channels = token_numbers(weights, number), halves = channels > LEAST_WIDTH && channels <= 2 * LEAST_WIDTH;
    return smaller(batch, halves ? ALL / 2 : ALL);
}

/* The blocks of a row that they multiply at a time, in equal parts: as many as leave the tiles of a panel in the level 1 cache,
 * with few tokens beside theirs and the packed weight. */
static int64_t blocks_of_tiles(const struct weights *weights, int32_t number, int64_t tokens)
{
    const int64_t bf16 = tokens > FEW_TOKENS ? TILE_BLOCKS : TILE_BLOCKS / 3;
    const int64_t most = bf16 / (parts_of(weights->number) * token_parts(weights, number));
    const int64_t parts = most > 1 ? (weights->count + most - 1) / most : weights->count;
    return (weights->count + parts - 1) / parts;
}

/* The rows of the weight that they multiply at a time. With few tokens the weight is read from memory as it is stored; where the
 * activations do not stay in the level 2 cache, as many as leave their sums there. */
static int64_t rows_of_tiles(const struct weights *weights, int32_t number, int64_t tokens)
{
    if (tokens <= FEW_TOKENS)
        return TILE_PANEL;
    return (tokens * token_numbers(weights, number) > 1 << 19 ? TILE_PANELS : 2) * TILE_PANEL;
}

/* The bytes of the tiles of activations, and of the sums of a thread. */
static int64_t bytes_of_tokens(const struct weights *weights, int32_t number, int64_t tokens)
{
    return pairs_of_groups(tokens) * TILE_TOKENS * token_numbers(weights, number) * (int64_t)sizeof(uint16_t);
}

static int64_t bytes_of_sums(const struct weights *weights, int32_t number, int64_t tokens)
{
    return rows_of_tiles(weights, number, tokens) * pairs_of_groups(tokens) * TILE_TOKENS * (int64_t)sizeof(float);
}

/* The bytes of the memory of both. */
static int64_t bytes_of_tiles(const struct weights *weights, int32_t number, int64_t tokens, int32_t threads)
{
    const int64_t most = tokens_of_tiles(weights, number, tokens);
    return bytes_of_tokens(weights, number, most) + threads * bytes_of_sums(weights, number, most);
}

/* Whether threads share the tokens rather than the weight. It is unpacked by each of them then, but tokens are read where they were
 * laid out, in the cache of the same core. */
static int shares_tokens(const struct weights *weights, int64_t batch, int32_t threads)
{
    return threads > 1 && batch >= threads * (FEW_TOKENS + 1) && weights->rows <= 4 * batch;
}

/* The product with `batch` of the tokens, from `first` on. */
static struct many_pairs part_of(const struct many *job, int64_t first, int64_t batch, void *channels, int32_t *nonfinite)
{
    const struct weights *weights = job->product.weights;
    const int32_t number = job->product.output_number;
    const int64_t bytes = number == F32 ? 4 : 2;
    return (struct many_pairs){
        .weights = weights,
        .activations = (const char *)job->activations + first * weights->width * bytes,
        .channels = channels,
        .output = (char *)job->product.output + first * weights->rows * bytes,
        .number = number,
        .nonfinite = nonfinite,
        .batch = batch,
    };
}

/* The products of `tokens` tokens from `first` on, in `memory`, with equal shares of the weight by `threads`. */
static void multiply_in_memory(const struct many *job, const struct kernels *kernels, int64_t first, int64_t tokens, int32_t threads,
                            char *memory, int32_t *nonfinite)
{
    const struct weights *weights = job->product.weights;
    const int32_t number = job->product.output_number;
    const int64_t most = tokens_of_tiles(weights, number, tokens);
    for (int64_t last = first + tokens; first < last; first += most) {
        struct many_pairs part = part_of(job, first, smaller(most, last - first), memory, nonfinite);
        part.sums = (float *)(memory + bytes_of_tokens(weights, number, most));
        part.chunk = rows_of_tiles(weights, number, most);
        part.chunks = threads;
        part.blocks = blocks_of_tiles(weights, number, most);
        run_in_pieces(&part, kernels->tiles->lay_out, (part.batch + 15) / 16, 1, threads);
        run_in_pieces(&part, kernels->tiles->many, threads, 1, threads);
    }
}

/* Equal shares of the tokens: whole pairs of groups, but the last. */
struct shares {
    const struct many *job;
    const struct kernels *kernels;
    int64_t tokens, bytes; /* of a share, and of its memory */
    int32_t *nonfinite;
};

static void multiply_shares(const void *argument, int64_t first, int64_t last)
{
    const struct shares *shares = argument;
    const int64_t batch = shares->job->product.staged->batch;
    for (int64_t share = first, token = share * shares->tokens; share < last && token < batch; share++, token += shares->tokens)
        multiply_in_memory(shares->job, shares->kernels, token, smaller(shares->tokens, batch - token), 1,
                        (char *)shares->job->product.staged->values + share * shares->bytes, shares->nonfinite);
}

/* The tokens of each share. */
static int64_t tokens_of_share(const struct weights *weights, int64_t batch, int32_t threads)
{
    return shares_tokens(weights, batch, threads) ? pairs_of_groups((batch + threads - 1) / threads) * TILE_TOKENS : batch;
}

/* Returns whether all activations are finite, as far as numbers are split. */
static int multiply_many_tiles(const struct many *job, const struct kernels *kernels, int32_t threads)
{
    const struct weights *weights = job->product.weights;
    const int64_t batch = job->product.staged->batch, tokens = tokens_of_share(weights, batch, threads);
    int32_t nonfinite = 0;
    if (tokens == batch) {
        multiply_in_memory(job, kernels, 0, batch, threads, job->product.staged->values, &nonfinite);
    } else {
        const int64_t bytes = bytes_of_tiles(weights, job->product.output_number, tokens, 1);
        const struct shares shares = {job, kernels, tokens, bytes, &nonfinite};
        run_in_pieces(&shares, multiply_shares, threads, 1, threads);
    }
    return !nonfinite;
}

/* Works on so many tokens at a time that they take the memory that the lines of many.h take. Returns whether all activations
 * are finite. */
static int multiply_many_pairs(const struct many *job, const struct kernels *kernels, int32_t threads)
{
    enum { AT_ONCE = TILES * 192 };
    const struct weights *weights = job->product.weights;
    const int64_t batch = job->product.staged->batch, least = (weights->rows + PAIR_CHUNK - 1) / PAIR_CHUNK;
    int32_t nonfinite = 0;
    for (int64_t first = 0; first < batch; first += AT_ONCE) {
        struct many_pairs part = part_of(job, first, smaller(AT_ONCE, batch - first), job->product.staged->values, &nonfinite);
        part.tiles = (part.batch + PAIR_TOKENS - 1) / PAIR_TOKENS;
        const int64_t wanted = (threads + part.tiles - 1) / part.tiles; /* chunks, so that each thread has work */
        part.chunks = least < wanted ? wanted : least;
        part.chunk = ((weights->rows + part.chunks - 1) / part.chunks + 31) / 32 * 32;
        part.chunks = (weights->rows + part.chunk - 1) / part.chunk;
        run_in_pieces(&part, kernels->pairs->turn, part.tiles, 1, threads);
        run_in_pieces(&part, kernels->pairs->many, part.tiles * part.chunks, 1, threads);
    }
    return !nonfinite;
}

static void multiply_many_floats(struct many *job, const struct kernels *kernels, int64_t tokens, int32_t threads)
{
    const int64_t chunks = (job->product.weights->rows + CHUNK - 1) / CHUNK;
    job->tiles = (job->product.staged->batch + tokens - 1) / tokens;
    for (job->first = 0; job->first < job->tiles; job->first = job->last) {
        job->last = smaller(job->first + TILES, job->tiles);
        run_in_pieces(job, kernels->spread, job->last - job->first, 1, threads);
        run_in_pieces(job, kernels->many, chunks, 1, threads);
    }
}

/* The floats of the lines of many.h, or a tile of pairs, which takes as much as 16 rows. */
static int64_t floats_of_lines(const struct weights *weights, int64_t batch, const struct kernels *kernels)
{
    const int64_t tokens = kernels->lanes * kernels->vectors, channels = weights->count * BLOCK;
    return smaller((batch < 16 ? 16 : batch) + kernels->lanes, TILES * tokens) * channels;
}

static int64_t bytes_of_products(const struct weights *weights, int32_t number, int64_t batch, int32_t index, int32_t threads)
{
    const int64_t tokens = tokens_of_share(weights, batch, threads);
    if (are_tiles(weights, number, index))
        return tokens == batch ? bytes_of_tiles(weights, number, batch, threads)
                               : threads * bytes_of_tiles(weights, number, tokens, 1);
    return floats_of_lines(weights, batch, find_kernels(index)) * (int64_t)sizeof(float);
}

/* The bytes of memory that `permprune_multiply_many` needs: of the products, and of a row of activations. */
EXPORT int64_t permprune_many_bytes(const struct weights *weights, int32_t number, int64_t batch, int32_t index,
                                    int32_t threads)
{
    if (!find_kernels(index) || bad_size(weights->rows) || bad_size(weights->count) || bad_size(batch) || threads < 1)
        return 0;
    return bytes_of_products(weights, number, batch, index, threads) + weights->count * BLOCK * (int64_t)sizeof(float);
}

/* The same for many rows of activations, and at least one channel, in `memory` of `bytes` bytes, of which it needs those of
 * `permprune_many_bytes`. PLAIN weights have such a kernel for integers on matrix units. */
EXPORT int32_t permprune_multiply_many(const struct weights *weights, const void *activations, int32_t number,
                                       int64_t batch, void *output, void *memory, int64_t bytes, int32_t index,
                                       int32_t threads)
{
    const struct kernels *kernels = find_kernels(index);
    if (!kernels)
        return NO_KERNEL;
    const int32_t status = check_product(weights, activations, number, batch, output);
    if (status != DONE)
        return status;
    if (!weights->count || (weights->kind == PLAIN && !are_tiles(weights, number, index)) || threads < 1 ||
        LACKS(bytes, memory) || (uintptr_t)memory % 64 ||
        bytes < permprune_many_bytes(weights, number, batch, index, threads))
        return BAD_SIZE;
    struct staged staged = {memory, NULL, batch};
    struct many job = {.product = {weights, &staged, output, number}, .activations = activations};
    int finite = 0;
    if (are_tiles(weights, number, index))
        finite = multiply_many_tiles(&job, kernels, threads);
    else if (are_pairs(weights, number, index))
        finite = multiply_many_pairs(&job, kernels, threads);
    else
        multiply_many_floats(&job, kernels, kernels->lanes * kernels->vectors, threads);
    if (!finite) {
        char *line = (char *)memory + bytes_of_products(weights, number, batch, index, threads);
        correct_nonfinite(&job.product, activations, number, (float *)line);
    }
    return DONE;
}
