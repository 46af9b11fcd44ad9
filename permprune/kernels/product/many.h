/* Products with many rows of activations, "tokens", where multiplications are the limit and not bytes.
 *
 * Tokens are divided into tiles of up to MOST_VECTORS vectors. `spread_tokens` lays out the activations of a tile as a line of
 * tokens for each channel, so that those of a block of channels fit into the level 1 cache. A row of the weight then needs,
 * for each kept value, one broadcast and one multiply-add for each vector of tokens, whose operand is read from the line of
 * the value's channel: what is pruned is not multiplied, and it does not matter which channels are kept. Loads are the limit,
 * V + 1 of them for V multiply-adds, where a dense product of 2:4 has 2 V multiply-adds.
 *
 * TILES tiles are spread and then multiplied by the whole weight, so that they are in a cache. A chunk of CHUNK rows is worked
 * on block by block of channels, so that a block of the weight is read from memory once for all of these tiles. Sums leave the
 * registers once for each block, to the level 2 cache. While a row is multiplied, a line of the next block of activations is
 * fetched.
 *
 * Expects LANES, VECTOR, LOAD, STORE, FMA and ZERO of family.h; SPREAD(const float *), a VECTOR of one number;
 * WIDEN_F16(const uint16_t *), LANES numbers of fp16, a VECTOR; and, if there is a fast way, TURN_8(const float *from, int64_t
 * apart, float *to, int64_t to_apart), which transposes 8 x 8 floats. */
#ifndef MOST
#define MOST (LANES < 16 ? 10 : 6)
#endif
enum { MOST_VECTORS = MOST };

static ALWAYS_INLINE void turn(const float *from, int64_t apart, float *to, int64_t to_apart, int rows, int columns)
{
#ifdef TURN_8
    if (rows == 8 && columns == 8) {
        TURN_8(from, apart, to, to_apart);
        return;
    }
#endif
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++)
            to[c * to_apart + r] = from[r * apart + c];
}

/* Vectors before tile `tile`: tiles differ by one vector at most. */
static ALWAYS_INLINE int64_t vectors_before(const struct many *job, int64_t tile)
{
    const int64_t vectors = (job->product.staged->batch + LANES - 1) / LANES;
    return tile * vectors / job->tiles;
}

static ALWAYS_INLINE float *token_lines(const struct many *job, int64_t tile, int64_t block)
{
    const int64_t before = vectors_before(job, tile), width = vectors_before(job, tile + 1) - before;
    const int64_t place = (before - vectors_before(job, job->first)) * job->product.weights->count + width * block;
    return (float *)job->product.staged->values + place * BLOCK * LANES;
}

/* Whether a block of activations of the tokens before `end` can be read where it is: whole, of floats, and in order. */
static ALWAYS_INLINE int is_in_place(const struct many *job, int64_t end, int64_t n)
{
    const struct weights *weights = job->product.weights;
    return !weights->order && job->product.output_number == F32 && (n + 1) * BLOCK <= weights->width &&
           end <= job->product.staged->batch;
}

/* Writes the lines of some tiles, with zeros after the last token. */
static void spread_tokens(const void *argument, int64_t first, int64_t last)
{
    const struct many *job = argument;
    const struct product *product = &job->product;
    const int64_t width = product->weights->width;
    float room[8][BLOCK];
    for (int64_t tile = job->first + first; tile < job->first + last; tile++) {
        const int64_t begin = vectors_before(job, tile) * LANES, end = vectors_before(job, tile + 1) * LANES;
        for (int64_t n = 0; n < product->weights->count; n++)
            for (int64_t token = begin; token < end; token += 8) {
                const int many = (int)smaller(8, end - token);
                const int in_place = is_in_place(job, token + many, n);
                const float *from = in_place ? (const float *)job->activations + token * width + n * BLOCK : room[0];
                for (int i = 0; i < many && !in_place; i++)
                    if (token + i < product->staged->batch)
                        read_block(product->weights, job->activations, token + i, n, product->output_number, room[i]);
                    else
                        memset(room[i], 0, sizeof room[i]);
                float *to = token_lines(job, tile, n) + (token - begin);
                for (int c = 0; c < BLOCK; c += 8)
                    turn(from + c, in_place ? width : BLOCK, to + c * (end - begin), end - begin, many, 8);
            }
    }
}

/* The values of a block as floats: those in memory, or copies in `room`. */
static ALWAYS_INLINE const float *float_values(const struct weights *weights, const char *block, float *restrict room)
{
    const int slots = (int)weights->slots;
    const uint16_t *restrict halves = (const uint16_t *)(block + CODE);
    const int8_t *restrict bytes = (const int8_t *)(block + HEADER_I8);
    const uint8_t *restrict pairs = (const uint8_t *)(block + HEADER_I4);
    int i = 0;
    switch (weights->number) { /* a separate loop for each type */
    case F32: return (const float *)(block + CODE);
    case BF16:
        for (; i < slots; i++)
            room[i] = bf16_to_f32(halves[i]);
        break;
    case F16:
        for (; i + LANES <= slots; i += LANES)
            STORE(room + i, WIDEN_F16(halves + i));
        for (; i < slots; i++)
            room[i] = f16_to_f32(halves[i]);
        break;
    case I8:
        for (; i < slots; i++)
            room[i] = (float)bytes[i] * read_scale(block, I8, 0);
        break;
    default:
        for (; i < slots / 2; i++) {
            room[2 * i] = (float)((pairs[i] & 15) - 8);
            room[2 * i + 1] = (float)((pairs[i] >> 4) - 8);
        }
        const uint64_t code = read_code(block), kept = kept_channels(code, weights->kind), odd = turned(code);
        if (weights->kind == POSITIONS)
            for (i = 0; i < BLOCK / 2; i++)
                room[i] = 2 * room[i] + (float)(odd >> i / 2 * 4 & 1);
        for (int part = 0, first = 0; part < BLOCK; part += PART) {
            const int last = first + __builtin_popcountll(kept >> part & ((1u << PART) - 1));
            for (int slot = first; slot < last && slot < slots; slot++)
                room[slot] *= read_scale(block, I4, part);
            first = last;
        }
    }
    return room;
}

/* Adds the products of a row of a block with a tile of tokens. */
static ALWAYS_INLINE void add_tokens(const struct weights *weights, uint64_t code, const float *values, const float *lines,
                                     float *sums, int first, const int vectors)
{
    const int width = vectors * LANES;
    VECTOR sum[MOST_VECTORS];
    UNROLLED for (int v = 0; v < vectors; v++)
        sum[v] = first ? ZERO() : LOAD(sums + v * LANES);
    if (weights->kind == POSITIONS) {
        /* Unrolled, the places of a group's lines and values are constants, which saves up to a tenth of the time. */
        UNROLLED for (int group = 0; group < BLOCK / 4; group++, code >>= 4, lines += 4 * width, values += 2) {
            const float *one = lines + (code & 3) * width, *two = lines + (code >> 2 & 3) * width;
            const VECTOR w = SPREAD(values), u = SPREAD(values + 1);
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[v] = FMA(sum[v], w, LOAD(one + v * LANES));
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[v] = FMA(sum[v], u, LOAD(two + v * LANES));
        }
    } else {
        const int kept = (int)smaller(__builtin_popcountll(code), weights->slots);
        for (int i = 0; i < kept; i++, code &= code - 1) {
            const float *line = lines + __builtin_ctzll(code) * width;
            const VECTOR w = SPREAD(values + i);
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[v] = FMA(sum[v], w, LOAD(line + v * LANES));
        }
    }
    UNROLLED for (int v = 0; v < vectors; v++)
        STORE(sums + v * LANES, sum[v]);
}

/* Adds the products of block `n` of `rows` rows from `row` on with a tile. `next` are the lines that follow; those of the
 * weight are fetched with the last tile, which is the last to read them. */
static ALWAYS_INLINE void add_chunk(const struct weights *weights, int64_t row, int rows, int64_t n, const float *lines,
                                    float (*sums)[MOST_VECTORS * LANES], const float *next, int last, const int vectors)
{
    const int64_t size = block_bytes(weights);
    const char *block = weights->blocks + (row * weights->count + n) * size;
    float room[BLOCK];
    for (int r = 0; r < rows; r++, block += weights->count * size) {
        for (int byte = 0; byte < vectors * LANES * 4; byte += 64) /* outside of the lines it does no harm */
            __builtin_prefetch((const char *)((uintptr_t)next + (uintptr_t)(r * vectors * LANES * 4 + byte)), 0, 2);
        for (int64_t byte = size; last && byte < 2 * size; byte += 64)
            __builtin_prefetch((const char *)((uintptr_t)block + (uintptr_t)byte));
        const float *values = float_values(weights, block, room);
        add_tokens(weights, read_code(block), values, lines, sums[r], n == 0, vectors);
    }
}

/* Adds the products of block `n` of some rows with a tile. */
static void add_tile(const struct many *job, int64_t row, int rows, int64_t n, int64_t tile,
                     float (*sums)[MOST_VECTORS * LANES])
{
    const int last = tile + 1 == job->last;
    const float *lines = token_lines(job, tile, n);
    const float *next = last ? token_lines(job, job->first, n + 1) : token_lines(job, tile + 1, n);
    switch (vectors_before(job, tile + 1) - vectors_before(job, tile)) {
#define ADD_CHUNK(vectors)                                                                                             \
    case vectors: add_chunk(job->product.weights, row, rows, n, lines, sums, next, last, vectors); break;
        ADD_CHUNK(1)
        ADD_CHUNK(2)
#if MOST > 2
        ADD_CHUNK(3)
        ADD_CHUNK(4)
        ADD_CHUNK(5)
        ADD_CHUNK(6)
#endif
#if MOST > 6
        ADD_CHUNK(7)
        ADD_CHUNK(8)
        ADD_CHUNK(9)
        ADD_CHUNK(10)
#endif
#undef ADD_CHUNK
    }
}

/* Writes the sums of a tile with `width` tokens from `token` on: (rows, tokens) to (tokens, rows). */
static void write_tokens(const struct product *job, int64_t row, int rows, int64_t token, int width,
                         float (*sums)[MOST_VECTORS * LANES], const float *bias)
{
    float room[8][CHUNK];
    const int left = (int)smaller(width, job->staged->batch - token);
    for (int t = 0; t < left; t += 8) {
        const int many = (int)smaller(8, left - t);
        for (int r = 0; r < rows; r += 8)
            turn(sums[r] + t, MOST_VECTORS * LANES, room[0] + r, CHUNK, (int)smaller(8, rows - r), many);
        for (int i = 0; i < many; i++) {
            for (int r = 0; r < rows; r++)
                room[i][r] += bias[r];
            write_floats(job->output, (token + t + i) * job->weights->rows + row, job->output_number, room[i], rows);
        }
    }
}

/* The products of some chunks of rows with the tiles that are spread. */
static void multiply_tokens(const void *argument, int64_t first, int64_t last)
{
    const struct many *job = argument;
    const struct weights *weights = job->product.weights;
    float sums[TILES][CHUNK][MOST_VECTORS * LANES] __attribute__((aligned(64))), bias[CHUNK];
    for (int64_t chunk = first; chunk < last; chunk++) {
        const int64_t row = chunk * CHUNK;
        const int rows = (int)smaller(CHUNK, weights->rows - row);
        for (int r = 0; r < rows; r++)
            bias[r] = weights->bias ? read_number(weights->bias, row + r, weights->bias_number) : 0.0f;
        for (int64_t n = 0; n < weights->count; n++)
            for (int64_t tile = job->first; tile < job->last; tile++)
                add_tile(job, row, rows, n, tile, sums[tile - job->first]);
        for (int64_t tile = job->first; tile < job->last; tile++) {
            const int64_t before = vectors_before(job, tile), after = vectors_before(job, tile + 1);
            float(*of_tile)[MOST_VECTORS * LANES] = sums[tile - job->first];
            write_tokens(&job->product, row, rows, before * LANES, (int)(after - before) * LANES, of_tile, bias);
        }
    }
}
