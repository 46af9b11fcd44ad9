/* Products of many rows of activations, "tokens", with packed weights on Intel's matrix units (AMX), which multiply tiles of bf16
 * and sum in fp32; fp32 and fp16 are multiplied in parts of bf16 (tile_layout.h). What is pruned is multiplied, as zeros: no other
 * instruction is nearly as fast. A dense product reads the weight from memory and arranges it there in the order of its tiles;
 * here it is unpacked in that order to the level 1 cache.
 *
 * Activations are laid out once, as tiles of 16 tokens by 32 channels, in pairs of channels, the second operand of TDPBF16PS. Of
 * the weight, a panel of TILE_PANEL rows and up to TILE_BLOCKS blocks is unpacked to tiles of 16 rows by 32 channels, the first
 * operand, and multiplied by all tokens, whose tiles are read past the level 1 cache. In registers are the sums of a panel and 32
 * tokens, four tiles; between the parts of a panel they are in the level 2 cache. As many panels follow each other as have room for
 * their sums there, so that activations are seldom read from memory. Meanwhile the weight that follows is fetched. Tokens that
 * follow are not: hardware does it, and instructions for it keep waiting what tiles need.
 *
 * Channels after the width are zeros in both operands. Activations that are not finite are multiplied by the zeros, too, which
 * gives what the dense product gives; where numbers are split, many.c corrects their rows. */

enum { TILE_SUMS = SIDE * SIDE, PANEL_SUMS = 4 * TILE_SUMS };
enum { APART = 64 }; /* bytes from row to row of a tile */
enum { LARGE = 1 << 20, STREAMED_WIDTH = 1024 }; /* bytes of outputs, and channels, from which streaming them is faster */

struct tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

static ALWAYS_INLINE void use_whole_tiles(void)
{
    struct tile_config config __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = SIDE;
    }
    _tile_loadconfig(&config);
}

/* ---- products ---- */

/* Which parts are multiplied, as places in the tiles of a step: those whose product is not below the rounding of the output. In
 * this order most share an operand with the one before, whose tiles stay in registers. */
struct terms {
    int64_t count, weight[6], tokens[6];
    int64_t weight_step, token_step;
};

static struct terms list_terms(const struct many_pairs *job)
{
    const int weight_parts = parts_of(job->weights->number), parts = token_parts(job->weights, job->number);
    const int most = job->number == F32 ? 2 : 1;
    struct terms terms = {.weight_step = 2 * weight_parts * TILE, .token_step = 2 * parts * TILE};
    for (int of_tokens = 0; of_tokens < parts; of_tokens++) {
        const int last = (int)smaller(weight_parts - 1, most - of_tokens);
        for (int i = 0; i <= last; i++) {
            terms.weight[terms.count] = 2 * TILE * (of_tokens % 2 ? last - i : i);
            terms.tokens[terms.count++] = 2 * TILE * of_tokens;
        }
    }
    return terms;
}

/* Fetches lines of sums, to be read and written, and returns what follows them. */
static ALWAYS_INLINE const float *fetch_sums(const float *next, const int lines)
{
    for (int line = 0; line < lines; line++)
        __builtin_prefetch(next + line * SIDE, 1, 3);
    return next + lines * SIDE;
}

/* Adds the products of tiles to four tiles of sums in registers. Each operand is loaded as soon as the register that it takes is
 * free, while others are multiplied; the sums of the next tokens are fetched. */
static ALWAYS_INLINE void add_steps(const uint16_t *weight, const uint16_t *tokens, int64_t steps, const float *next)
{
    _tile_loadd(4, weight, APART);
    _tile_loadd(5, weight + TILE, APART);
    _tile_stream_loadd(6, tokens, APART);
    _tile_stream_loadd(7, tokens + TILE, APART);
    for (int64_t step = 1; step < steps; step++) {
        weight += 2 * TILE;
        tokens += 2 * TILE;
        next = fetch_sums(next, 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_stream_loadd(6, tokens, APART);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(5, weight + TILE, APART);
        _tile_dpbf16ps(2, 4, 7);
        _tile_stream_loadd(7, tokens + TILE, APART);
        _tile_loadd(4, weight, APART);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

/* The same for several parts, or, if not `both`, for the first two tiles, of 16 tokens. */
static ALWAYS_INLINE void add_terms(const uint16_t *weight, const uint16_t *tokens, int64_t steps, const struct terms *terms,
                                    const int64_t count, const float *next, const int both)
{
    for (int64_t step = 0; step < steps; step++, weight += terms->weight_step, tokens += terms->token_step)
        for (int64_t i = 0; i < count; i++) {
            next = fetch_sums(next, 6);
            const uint16_t *rows = weight + terms->weight[i], *channels = tokens + terms->tokens[i];
            if (!i || terms->weight[i] != terms->weight[i - 1]) {
                _tile_loadd(4, rows, APART);
                _tile_loadd(5, rows + TILE, APART);
            }
            if (!i || terms->tokens[i] != terms->tokens[i - 1]) {
                _tile_stream_loadd(6, channels, APART);
                if (both)
                    _tile_stream_loadd(7, channels + TILE, APART);
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (both) {
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
}

/* Adds to four tiles of sums, of a panel and 32 tokens, or to the first two, of 16 tokens. */
static ALWAYS_INLINE void add_tiles(const uint16_t *weight, const uint16_t *tokens, int64_t steps, float *sums, int first,
                                    const struct terms *terms, const int both)
{
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, APART);
        _tile_loadd(1, sums + TILE_SUMS, APART);
        _tile_loadd(2, sums + 2 * TILE_SUMS, APART);
        _tile_loadd(3, sums + 3 * TILE_SUMS, APART);
    }
    if (terms->count == 1 && both)
        add_steps(weight, tokens, steps, sums + PANEL_SUMS);
    else
        add_terms(weight, tokens, steps, terms, terms->count, sums + PANEL_SUMS, both);
    _tile_stored(0, sums, APART);
    _tile_stored(1, sums + TILE_SUMS, APART);
    if (both) {
        _tile_stored(2, sums + 2 * TILE_SUMS, APART);
        _tile_stored(3, sums + 3 * TILE_SUMS, APART);
    }
}

/* Adds the products of all tokens with `count` blocks from number `n` on of a panel to its sums. If there is a `next`, some rows of
 * as many blocks are fetched from there for each 32 tokens. */
static ALWAYS_INLINE void multiply_panel(const struct many_pairs *job, int64_t n, int64_t count, const uint16_t *tiles, float *sums,
                                         const struct terms *terms, uintptr_t next)
{
    const int64_t pairs = pairs_of_groups(job->batch), some = next ? (TILE_PANEL + pairs - 1) / pairs : 0;
    const int64_t size = block_bytes(job->weights), apart = job->weights->count * size;
    for (int64_t token = 0; token < job->batch; token += TILE_TOKENS, sums += PANEL_SUMS) {
        for (int64_t r = 0; r < some; r++, next += (uintptr_t)apart)
            for (int64_t byte = 0; byte < count * size; byte += 64)
                __builtin_prefetch((const char *)(next + (uintptr_t)byte), 0, 2);
        const uint16_t *tokens = tokens_of_group(job, token / SIDE, n);
        add_tiles(tiles, tokens, 2 * count, sums, n == 0, terms, token + SIDE < job->batch);
    }
}

/* Writes the sums of `rows` rows from `row` on: those of a token one after the other, which takes half of the time of panels. */
static ALWAYS_INLINE void write_panels(const struct many_pairs *job, int64_t row, int64_t rows, const float *sums)
{
    const struct weights *weights = job->weights;
    const int64_t apart = pairs_of_groups(job->batch) * PANEL_SUMS;
    const int streamed = job->batch * weights->rows * 2 >= LARGE && weights->width >= STREAMED_WIDTH;
    float bias[TILE_PANELS * TILE_PANEL] = {0};
    for (int64_t r = 0; weights->bias && r < rows; r++)
        bias[r] = read_number(weights->bias, row + r, weights->bias_number);
    for (int64_t token = 0; token < job->batch; token += SIDE, sums += 2 * TILE_SUMS)
        for (int64_t r = 0; r < rows; r += TILE_PANEL)
            write_group(job, row + r, smaller(TILE_PANEL, rows - r), token, sums + r / TILE_PANEL * apart, SIDE, bias + r, streamed);
}

/* The products of all tokens with the panels of `rows` rows from `row` on. There is room for the sums of whole panels. */
static ALWAYS_INLINE void multiply_panels(const struct many_pairs *job, int64_t row, int64_t rows, float *sums,
                                          const int32_t number, const int32_t kind)
{
    const struct weights *weights = job->weights;
    const int64_t all = weights->count, apart = pairs_of_groups(job->batch) * PANEL_SUMS;
    const int soon = job->batch <= TILE_TOKENS; /* multiplying takes less time than unpacking */
    const struct terms terms = list_terms(job);
    uint16_t tiles[TILE_PANEL * TILE_BLOCKS * BLOCK] __attribute__((aligned(64)));
    for (int64_t n = 0; n < all; n += job->blocks)
        for (int64_t r = 0; r < rows; r += TILE_PANEL) {
            const int64_t count = smaller(job->blocks, all - n), next_row = row + r + TILE_PANEL;
            const int64_t next_part = n + count < all ? row * all + n + count : (row + rows) * all;
            const int64_t place = (next_row < row + rows ? next_row * all + n : next_part) * block_bytes(weights);
            const uintptr_t next = (uintptr_t)weights->blocks + (uintptr_t)place; /* after the weight it does no harm */
            unpack_panel(weights, row + r, n, count, tiles, soon ? next : 0, number, kind);
            multiply_panel(job, n, count, tiles, sums + r / TILE_PANEL * apart, &terms, soon ? 0 : next);
        }
    write_panels(job, row, rows, sums);
}

/* The products of all tokens with some of `chunks` equal shares of the panels, `chunk` rows at a time. */
static void multiply_tiles(const void *argument, int64_t first, int64_t last)
{
    const struct many_pairs *job = argument;
    const int64_t panels = (job->weights->rows + TILE_PANEL - 1) / TILE_PANEL;
    use_whole_tiles();
    for (int64_t share = first; share < last; share++) {
        const int64_t end = smaller((share + 1) * panels / job->chunks * TILE_PANEL, job->weights->rows);
        float *sums = job->sums + share * (job->chunk / TILE_PANEL) * pairs_of_groups(job->batch) * PANEL_SUMS;
        for (int64_t row = share * panels / job->chunks * TILE_PANEL; row < end; row += job->chunk) {
            const int64_t rows = smaller(job->chunk, end - row);
            switch (job->weights->number * KINDS + job->weights->kind) {
#define MULTIPLY(number, kind)                                                                                         \
    case number * KINDS + kind: multiply_panels(job, row, rows, sums, number, kind); break;
                MULTIPLY(F32, MASK)
                MULTIPLY(F32, POSITIONS)
                MULTIPLY(BF16, MASK)
                MULTIPLY(BF16, POSITIONS)
                MULTIPLY(F16, MASK)
                MULTIPLY(F16, POSITIONS)
                MULTIPLY(I8, MASK)
                MULTIPLY(I8, POSITIONS)
                MULTIPLY(I8, PLAIN)
                MULTIPLY(I4, MASK)
                MULTIPLY(I4, POSITIONS)
#undef MULTIPLY
            }
        }
    }
    _mm_sfence(); /* what is streamed is seen by other threads */
    _tile_release();
}
