/* Products of many rows of activations, "tokens", with packed weights on Intel's matrix units (AMX), which multiply tiles of bf16
 * and sum in fp32. What is pruned is multiplied, as zeros: no other instruction is nearly as fast. A dense product reads the weight
 * from memory and arranges it there in the order of its tiles; here it is unpacked in that order to the level 1 cache.
 *
 * Activations are laid out once, as tiles of 16 tokens by 32 channels, in pairs of channels, the second operand of TDPBF16PS. Of
 * the weight, a panel of TILE_PANEL rows and AMX_CHANNELS channels is unpacked to tiles of 16 rows by 32 channels, the first
 * operand, and multiplied by all tokens, whose tiles are read past the level 1 cache. In registers are the sums of a panel and 32
 * tokens, four tiles; between the parts of a panel they are in the level 2 cache. As many panels follow each other as have room for
 * their sums there, so that activations are seldom read from memory. While tiles are multiplied, what is read next is fetched.
 *
 * Channels after the width are zeros in both operands. Activations that are not finite are multiplied by the zeros, too, which
 * gives what the dense product gives. */

enum { SIDE = 16, STEP = 32, TILE = SIDE * STEP }; /* rows and channels of a tile, and its numbers */
enum { TILE_SUMS = SIDE * SIDE, PANEL_SUMS = 4 * TILE_SUMS };
enum { AMX_CHANNELS = 512, AMX_BLOCKS = AMX_CHANNELS / BLOCK };
enum { LARGE = 1 << 20, STREAMED_WIDTH = 2048 }; /* bytes of outputs, and channels, from which streaming them is faster */

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

/* ---- activations ---- */

/* The first tile of a group of 16 tokens from block `n` on. Parts of AMX_CHANNELS channels follow each other; in each, the tiles
 * of two groups take turns, as they are read. */
static ALWAYS_INLINE uint16_t *tokens_of_group(const struct many_pairs *job, int64_t group, int64_t n)
{
    const int64_t start = n / AMX_BLOCKS * AMX_BLOCKS, count = smaller(AMX_BLOCKS, job->weights->count - start);
    const int64_t steps = 2 * (start * pairs_of_groups(job->batch) + group / 2 * count + (n - start));
    return job->channels + (2 * steps + group % 2) * TILE;
}

/* 32 channels of a token in the weight's order, with zeros where `some` has no bit. */
static ALWAYS_INLINE __m512i load_in_order(const struct many_pairs *job, int64_t token, int64_t channel, __mmask32 some)
{
    const int64_t *order = job->weights->order, first = token * job->weights->width;
    if (!order)
        return load_channels(job, first + channel, some);
    uint16_t line[STEP] __attribute__((aligned(64))) = {0};
    const int count = (int)smaller(STEP, job->weights->width - channel);
    if (job->number == BF16)
        for (int c = 0; c < count; c++)
            line[c] = ((const uint16_t *)job->activations)[first + order[channel + c]];
    else
        for (int c = 0; c < count; c++)
            line[c] = f32_to_bf16(((const float *)job->activations)[first + order[channel + c]]);
    return _mm512_load_si512(line);
}

/* Lays out some groups of 16 tokens, with zeros after the last token and channel. */
static void lay_out_tokens(const void *argument, int64_t first, int64_t last)
{
    const struct many_pairs *job = argument;
    const int64_t width = job->weights->width, channels = job->weights->count * BLOCK;
    for (int64_t group = first; group < last; group++)
        for (int64_t channel = 0; channel < channels; channel += STEP) {
            const int64_t left = smaller(STEP, width - channel), token = group * SIDE;
            const __mmask32 some = left > 0 ? (__mmask32)((1ull << left) - 1) : 0;
            __m512i row[SIDE];
            UNROLLED for (int i = 0; i < SIDE; i++)
                row[i] = some && token + i < job->batch ? load_in_order(job, token + i, channel, some) : _mm512_setzero_si512();
            turn_16(row);
            uint16_t *to = tokens_of_group(job, group, channel / BLOCK) + channel % BLOCK / STEP * 2 * TILE;
            UNROLLED for (int i = 0; i < SIDE; i++)
                _mm512_store_si512(to + i * STEP, row[i]);
        }
}

/* ---- weights ---- */

/* The masks of the channels that eight codes of POSITIONS keep. */
static ALWAYS_INLINE __m512i masks_of(__m512i codes)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
    const __m512i low = _mm512_set1_epi8(15), first = _mm512_and_si512(codes, low);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
    return _mm512_or_si512(_mm512_shuffle_epi8(table, first), _mm512_slli_epi16(_mm512_shuffle_epi8(table, second), 4));
}

/* The channels of a block as bf16, for its kept integers in the order of the channels. */
static ALWAYS_INLINE void expand_steps(const char *block, uint64_t bits, __m512i steps, const int32_t number, __m512i out[2])
{
    const __m512i bytes = _mm512_maskz_expand_epi8(bits, steps);
    __m512 part[4];
#define EXPAND_PART(i)                                                                                                 \
    part[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, i))),             \
                            _mm512_set1_ps(read_scale(block, number, PART * i)));
    EXPAND_PART(0) EXPAND_PART(1) EXPAND_PART(2) EXPAND_PART(3)
#undef EXPAND_PART
    out[0] = (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]);
    out[1] = (__m512i)_mm512_cvtne2ps_pbh(part[3], part[2]);
}

/* The 64 channels of a block as bf16, with zeros where `bits` has none. Nothing from `end` on is read. */
static ALWAYS_INLINE void unpack_block(const char *block, uint64_t bits, const char *end, const int32_t number,
                                       const int32_t kind, __m512i out[2])
{
    const __mmask32 low = (__mmask32)bits, high = (__mmask32)(bits >> 32);
    const char *values = block + (number == BF16 ? CODE : number == I8 ? HEADER_I8 : HEADER_I4);
    char room[2 * BLOCK];
    if (kind == POSITIONS && number != I8) { /* 16 of each half */
        const __m512i kept = number == I4 ? read_steps_i4(block) : _mm512_loadu_si512(values);
        out[0] = _mm512_maskz_expand_epi16(low, kept);
        out[1] = _mm512_maskz_expand_epi16(high, _mm512_shuffle_i64x2(kept, kept, 0xee));
    } else if (number == BF16) {
        const uint16_t *kept = readable(values, end, room, 2 * BLOCK);
        out[0] = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(kept));
        out[1] = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(kept + __builtin_popcount(low)));
    } else if (number == I8) {
        expand_steps(block, bits, _mm512_loadu_si512(readable(values, end, room, BLOCK)), I8, out);
    } else {
        values = readable(values, end, room, BLOCK / 2);
        const __m512i first = _mm512_castsi256_si512(load_nibbles(values));
        expand_steps(block, bits, _mm512_inserti64x4(first, load_nibbles(values + BLOCK / 4), 1), I4, out);
    }
}

/* Unpacks `count` blocks from number `n` on of a panel to tiles: of each step, one of its first and one of its last 16 rows. */
static ALWAYS_INLINE void unpack_panel(const struct weights *weights, int64_t row, int64_t n, int64_t count, uint16_t *tiles,
                                       const int32_t number, const int32_t kind)
{
    const int64_t size = block_bytes(weights), apart = weights->count * size, rows = smaller(TILE_PANEL, weights->rows - row);
    const char *const end = weights->blocks + weights->rows * apart, *const panel = weights->blocks + row * apart + n * size;
    uint64_t masks[TILE_PANEL][AMX_BLOCKS] __attribute__((aligned(64))) = {{0}};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++)
            masks[r][i] = read_code(panel + r * apart + i * size);
    for (int64_t r = 0; r < rows && kind == POSITIONS; r++)
        _mm512_store_si512(masks[r], masks_of(_mm512_load_si512(masks[r])));
    for (int64_t i = 0; i < count; i++, tiles += 4 * TILE)
        for (int64_t r = 0; r < TILE_PANEL; r++) {
            __m512i out[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (r < rows)
                unpack_block(panel + r * apart + i * size, masks[r][i], end, number, kind, out);
            _mm512_store_si512(tiles + r * STEP, out[0]);
            _mm512_store_si512(tiles + r * STEP + 2 * TILE, out[1]);
        }
}

/* ---- what is read next ---- */

/* Lines of a cache that are fetched while tiles are multiplied: the next blocks of the weight, in rows that are `apart` bytes from
 * each other, and the next tokens. What is outside of them does no harm. */
struct ahead {
    uintptr_t row, tokens;
    int64_t line, lines, apart; /* the next line of a row, and their number */
    int64_t weight_lines, token_lines; /* for each step */
};

static ALWAYS_INLINE void fetch_lines(struct ahead *ahead)
{
    for (int64_t i = 0; i < ahead->weight_lines; i++) {
        __builtin_prefetch((const char *)(ahead->row + (uintptr_t)(64 * ahead->line)), 0, 2);
        if (++ahead->line == ahead->lines) {
            ahead->line = 0;
            ahead->row += (uintptr_t)ahead->apart;
        }
    }
    for (int64_t i = 0; i < ahead->token_lines; i++, ahead->tokens += 64)
        __builtin_prefetch((const char *)ahead->tokens, 0, 2);
}

/* What is read after the blocks from number `n` on of the panel from row number `r` on, of `rows` rows from `row` on. */
static ALWAYS_INLINE struct ahead look_ahead(const struct many_pairs *job, int64_t row, int64_t rows, int64_t r, int64_t n)
{
    const struct weights *weights = job->weights;
    const int last_panel = r + TILE_PANEL >= rows, last_part = n + AMX_BLOCKS >= weights->count;
    const int64_t size = block_bytes(weights), part = last_part ? 0 : n + AMX_BLOCKS, next = last_panel ? part : n;
    const int64_t next_row = row + (last_panel && !last_part ? 0 : r + TILE_PANEL);
    const int64_t steps = 2 * smaller(AMX_BLOCKS, weights->count - n), panels = (rows + TILE_PANEL - 1) / TILE_PANEL;
    struct ahead ahead = {.apart = weights->count * size};
    ahead.row = (uintptr_t)weights->blocks + (uintptr_t)(next_row * ahead.apart + next * size);
    ahead.lines = (smaller(AMX_BLOCKS, weights->count - next) * size + 63) / 64 + 1;
    ahead.weight_lines = (ahead.lines * TILE_PANEL + steps * pairs_of_groups(job->batch) - 1) / (steps * pairs_of_groups(job->batch));
    if (panels > 1) { /* each fetches a part */
        ahead.token_lines = (2 * 2 * SIDE + panels - 1) / panels;
        ahead.tokens = (uintptr_t)tokens_of_group(job, 0, part);
        ahead.tokens += (uintptr_t)(r / TILE_PANEL * ahead.token_lines * steps * pairs_of_groups(job->batch) * 64);
    }
    return ahead;
}

/* ---- products ---- */

/* Adds to four tiles of sums, of a panel and 32 tokens, or to the first two, of 16 tokens. */
static ALWAYS_INLINE void add_tiles(const uint16_t *weight, const uint16_t *tokens, int64_t steps, float *sums, int first,
                                    struct ahead *ahead, const int both)
{
    enum { APART = 64 }; /* bytes from row to row */
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
    for (int64_t step = 0; step < steps; step++, weight += 2 * TILE, tokens += 2 * TILE) {
        fetch_lines(ahead);
        _tile_loadd(4, weight, APART);
        _tile_stream_loadd(6, tokens, APART);
        _tile_loadd(5, weight + TILE, APART);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (both) {
            _tile_stream_loadd(7, tokens + TILE, APART);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, APART);
    _tile_stored(1, sums + TILE_SUMS, APART);
    if (both) {
        _tile_stored(2, sums + 2 * TILE_SUMS, APART);
        _tile_stored(3, sums + 3 * TILE_SUMS, APART);
    }
}

/* Writes 64 bytes, or those that `some` has, two at a time; past the caches, if they are `streamed` and whole lines. */
static ALWAYS_INLINE void write_vector(void *to, __mmask32 some, __m512i vector, int streamed)
{
    if (streamed && some == UINT32_MAX && (uintptr_t)to % 64 == 0)
        _mm512_stream_si512(to, vector);
    else
        _mm512_mask_storeu_epi16(to, some, vector);
}

/* Writes the sums of the first `rows` rows of a panel and of 16 tokens, in the type of the activations. */
static ALWAYS_INLINE void write_group(const struct many_pairs *job, int64_t row, int64_t rows, int64_t token, const float *sums,
                                      const float bias[TILE_PANEL])
{
    const int64_t apart = job->weights->rows, tokens = smaller(SIDE, job->batch - token), place = token * apart + row;
    const __mmask32 some = (__mmask32)((1ull << rows) - 1);
    const int streamed = job->batch * apart * 2 >= LARGE && job->weights->width >= STREAMED_WIDTH;
    __m512i line[SIDE];
    if (job->number == BF16) {
        UNROLLED for (int i = 0; i < SIDE; i++)
            line[i] = pair_rows(sums + 2 * i * SIDE, sums + (2 * i + 1) * SIDE, bias + 2 * i);
        turn_16(line);
        UNROLLED for (int i = 0; i < SIDE; i++)
            if (i < tokens)
                write_vector((uint16_t *)job->output + place + i * apart, some, line[i], streamed);
        return;
    }
    for (int half = 0; half < TILE_PANEL; half += SIDE) {
        UNROLLED for (int i = 0; i < SIDE; i++)
            line[i] = (__m512i)_mm512_add_ps(_mm512_load_ps(sums + (half + i) * SIDE), _mm512_set1_ps(bias[half + i]));
        turn_16(line);
        UNROLLED for (int i = 0; i < SIDE; i++)
            if (i < tokens)
                _mm512_mask_storeu_ps((float *)job->output + place + i * apart + half, (__mmask16)(some >> half), (__m512)line[i]);
    }
}

/* The products of all tokens with `count` blocks from number `n` on of a panel of `rows` rows, added to its sums. After the last
 * blocks each four tiles of sums are written to the output, while matrix units work on the next. */
static ALWAYS_INLINE void multiply_panel(const struct many_pairs *job, int64_t row, int64_t rows, int64_t n, int64_t count,
                                         const uint16_t *tiles, float *sums, struct ahead *ahead)
{
    const struct weights *weights = job->weights;
    const int last = n + count == weights->count;
    float bias[TILE_PANEL] = {0};
    for (int i = 0; weights->bias && i < rows; i++)
        bias[i] = read_number(weights->bias, row + i, weights->bias_number);
    for (int64_t token = 0; token < job->batch; token += TILE_TOKENS, sums += PANEL_SUMS) {
        const uint16_t *tokens = tokens_of_group(job, token / SIDE, n);
        const int both = token + SIDE < job->batch;
        if (both)
            add_tiles(tiles, tokens, 2 * count, sums, n == 0, ahead, 1);
        else
            add_tiles(tiles, tokens, 2 * count, sums, n == 0, ahead, 0);
        for (int half = 0; last && half <= both; half++)
            write_group(job, row, rows, token + half * SIDE, sums + half * 2 * TILE_SUMS, bias);
    }
}

/* The products of all tokens with the panels of `rows` rows from `row` on. There is room for the sums of whole panels. */
static ALWAYS_INLINE void multiply_panels(const struct many_pairs *job, int64_t row, int64_t rows, float *sums,
                                          const int32_t number, const int32_t kind)
{
    const struct weights *weights = job->weights;
    const int64_t apart = pairs_of_groups(job->batch) * PANEL_SUMS;
    uint16_t tiles[TILE_PANEL * AMX_CHANNELS] __attribute__((aligned(64)));
    for (int64_t n = 0; n < weights->count; n += AMX_BLOCKS)
        for (int64_t r = 0; r < rows; r += TILE_PANEL) {
            const int64_t count = smaller(AMX_BLOCKS, weights->count - n), some = smaller(TILE_PANEL, rows - r);
            struct ahead ahead = look_ahead(job, row, rows, r, n);
            unpack_panel(weights, row + r, n, count, tiles, number, kind);
            multiply_panel(job, row + r, some, n, count, tiles, sums + r / TILE_PANEL * apart, &ahead);
        }
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
            switch (job->weights->number * 2 + job->weights->kind) {
#define MULTIPLY(number, kind)                                                                                         \
    case number * 2 + kind: multiply_panels(job, row, rows, sums, number, kind); break;
                MULTIPLY(BF16, MASK)
                MULTIPLY(BF16, POSITIONS)
                MULTIPLY(I8, MASK)
                MULTIPLY(I8, POSITIONS)
                MULTIPLY(I4, MASK)
                MULTIPLY(I4, POSITIONS)
#undef MULTIPLY
            }
        }
    }
    _mm_sfence(); /* what is streamed is seen by other threads */
    _tile_release();
}
