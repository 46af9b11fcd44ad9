/* Attention of many queries in bf16 on matrix units, after product/many_tiles.h.
 *
 * Keys and values of a head are laid out as second operands of TDPBF16PS. Queries are read 32 at a time: their scores for all tokens
 * are in the level 1 or 2 cache, in fp32, so that the softmax needs no corrections; shares are rounded to bf16. */

/* What a thread works with, for `tokens` tokens and `width` channels, multiples of 32 with zeros after those there are. */
struct attention_room {
    int64_t tokens, width, apart;  /* numbers from row to row of scores and of shares */
    uint16_t *keys, *values;       /* tiles of 16 tokens by 32 channels, of 32 tokens by 16 channels */
    uint16_t *query, *shares;      /* (32, width), (32, apart) */
    float *scores, *sums;          /* (32, apart), (16, width) */
};

/* The lowest `count` of 32 bits; none for fewer than 1, all for more than 31. */
static ALWAYS_INLINE __mmask32 lowest_bits(int64_t count)
{
    return count >= 32 ? UINT32_MAX : count > 0 ? (1u << count) - 1 : 0;
}

/* `count` numbers, at most 32, and zeros. */
static ALWAYS_INLINE __m512i load_some_halves(const uint16_t *from, int64_t count)
{
    return _mm512_maskz_loadu_epi16(lowest_bits(count), from);
}

/* 16 numbers in lanes of 32 bits: the first half of 32, or the second. */
static ALWAYS_INLINE __m512i widen_half(__m512i numbers, const int half)
{
    return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(numbers, 1) : _mm512_castsi512_si256(numbers));
}

static void lay_out_keys(const struct attend_many *job, const uint16_t *from, const struct attention_room *room)
{
    uint16_t *to = room->keys;
    for (int64_t token = 0; token < room->tokens; token += SIDE)
        for (int64_t channel = 0; channel < room->width; channel += STEP, to += TILE) {
            __m512i rows[SIDE];
            UNROLLED for (int i = 0; i < SIDE; i++)
                rows[i] = token + i < job->length
                              ? load_some_halves(from + (token + i) * job->key_stride[2] + channel, job->width - channel)
                              : _mm512_setzero_si512();
            turn_16(rows);
            UNROLLED for (int i = 0; i < SIDE; i++)
                _mm512_store_si512(to + i * STEP, rows[i]);
        }
}

static void lay_out_values(const struct attend_many *job, const uint16_t *from, const struct attention_room *room)
{
    for (int64_t token = 0; token < room->tokens; token += 2)
        for (int64_t channel = 0; channel < room->width; channel += STEP) {
            __m512i two[2];
            UNROLLED for (int i = 0; i < 2; i++)
                two[i] = token + i < job->length
                             ? load_some_halves(from + (token + i) * job->value_stride[2] + channel, job->width - channel)
                             : _mm512_setzero_si512();
            uint16_t *to = room->values + (token / STEP * (room->width / SIDE) + channel / SIDE) * TILE + token % STEP / 2 * STEP;
            UNROLLED for (int half = 0; half < 2; half++) {
                const __m512i second = _mm512_slli_epi32(widen_half(two[1], half), 16);
                _mm512_store_si512(to + half * TILE, _mm512_or_si512(widen_half(two[0], half), second));
            }
        }
}

/* The scores of 32 queries, or of the first 16 unless `both`, for `tokens` tokens. */
static ALWAYS_INLINE void multiply_keys(const struct attention_room *room, int64_t tokens, const int both)
{
    const uint16_t *keys = room->keys;
    for (int64_t token = 0; token < tokens; token += SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t channel = 0; channel < room->width; channel += STEP, keys += TILE) {
            _tile_loadd(4, room->query + channel, 2 * room->width);
            _tile_loadd(6, keys, APART);
            _tile_dpbf16ps(0, 4, 6);
            if (both) {
                _tile_loadd(5, room->query + SIDE * room->width + channel, 2 * room->width);
                _tile_dpbf16ps(1, 5, 6);
            }
        }
        _tile_stored(0, room->scores + token, 4 * room->apart);
        if (both)
            _tile_stored(1, room->scores + SIDE * room->apart + token, 4 * room->apart);
    }
}

/* 2^x for x <= 0, with a relative error of 1e-4; bits of bf16 are 4e-3. */
static ALWAYS_INLINE __m512 power_of_two(__m512 x)
{
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_fmadd_ps(rest, _mm512_set1_ps(0.0780245662f), _mm512_set1_ps(0.226067096f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.695833564f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.999925196f)), x);
}

/* Which of 32 tokens a query reads, of `limit`. */
static ALWAYS_INLINE __mmask32 tokens_read(const uint8_t *mask, int64_t token, int64_t limit)
{
    const __mmask32 some = lowest_bits(limit - token);
    if (!mask)
        return some;
    const __m256i given = _mm256_maskz_loadu_epi8(some, mask + token);
    return _mm256_test_epi8_mask(given, given);
}

/* Raises the largest scores, of every other lane of 32 tokens that are read. */
static ALWAYS_INLINE void raise_largest(const float *scores, __mmask32 read, __m512 largest[2])
{
    UNROLLED for (int i = 0; i < 2; i++)
        largest[i] = _mm512_mask_max_ps(largest[i], (__mmask16)(read >> i * SIDE), largest[i], _mm512_loadu_ps(scores + i * SIDE));
}

/* Writes the shares of 32 tokens, and adds them to the totals. */
static ALWAYS_INLINE void write_shares(const float *scores, __mmask32 read, __m512 factor, __m512 most, uint16_t *shares,
                                       __m512 total[2])
{
    __m512 part[2];
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i * SIDE), factor, most));
        part[i] = _mm512_maskz_mov_ps((__mmask16)(read >> i * SIDE), power);
        total[i] = _mm512_add_ps(total[i], part[i]);
    }
    _mm512_storeu_si512(shares, (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]));
}

/* Writes the shares of a query for `limit` tokens, and zeros up to `tokens`. Returns 1 / their sum. */
static ALWAYS_INLINE float share_out(const float *scores, uint16_t *shares, const uint8_t *mask, int64_t limit, int64_t tokens,
                                     float scaling)
{
    const int64_t whole = mask ? 0 : limit / STEP * STEP;
    const __m512 lowest = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scaling * 1.44269504f);
    __m512 largest[2] = {lowest, lowest}, total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t token = 0; token < whole; token += STEP)
        raise_largest(scores + token, UINT32_MAX, largest);
    for (int64_t token = whole; token < limit; token += STEP)
        raise_largest(scores + token, tokens_read(mask, token, limit), largest);
    const __m512 most = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]))), factor);
    for (int64_t token = 0; token < whole; token += STEP)
        write_shares(scores + token, UINT32_MAX, factor, most, shares + token, total);
    for (int64_t token = whole; token < tokens; token += STEP)
        write_shares(scores + token, tokens_read(mask, token, limit), factor, most, shares + token, total);
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
    return sum == 0.0f ? 0.0f : 1.0f / sum; /* a query that reads no token gets zeros */
}

/* Adds up the values of `tokens` tokens for 16 queries, 64 channels at a time. */
static ALWAYS_INLINE void multiply_values(const struct attention_room *room, const uint16_t *shares, int64_t tokens)
{
    const int64_t tiles = room->width / SIDE;
    for (int64_t first = 0; first < tiles; first += 4) {
        const int four = first + 2 < tiles;
        const uint16_t *values = room->values + first * TILE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t token = 0; token < tokens; token += STEP, values += tiles * TILE) {
            _tile_loadd(4, shares + token, 2 * room->apart);
            _tile_loadd(5, values, APART);
            _tile_loadd(6, values + TILE, APART);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            if (four) {
                _tile_loadd(5, values + 2 * TILE, APART);
                _tile_loadd(6, values + 3 * TILE, APART);
                _tile_dpbf16ps(2, 4, 5);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, room->sums + first * SIDE, 4 * room->width);
        _tile_stored(1, room->sums + (first + 1) * SIDE, 4 * room->width);
        if (four) {
            _tile_stored(2, room->sums + (first + 2) * SIDE, 4 * room->width);
            _tile_stored(3, room->sums + (first + 3) * SIDE, 4 * room->width);
        }
    }
}

/* The outputs of up to 32 queries from number `first` on. */
static ALWAYS_INLINE void attend_queries(const struct attend_many *job, int64_t batch, int64_t head, int64_t first,
                                         const struct attention_room *room)
{
    const int64_t count = smaller(2 * SIDE, job->count - first), heads = job->heads * job->group;
    const int64_t limit = job->causal ? smaller(first + count, job->length) : job->length, tokens = (limit + STEP - 1) / STEP * STEP;
    const uint16_t *query = (const uint16_t *)job->query + batch * job->query_stride[0] + head * job->query_stride[1];
    for (int64_t i = 0; i < count; i++)
        for (int64_t channel = 0; channel < room->width; channel += STEP)
            _mm512_store_si512(room->query + i * room->width + channel,
                               load_some_halves(query + (first + i) * job->query_stride[2] + channel, job->width - channel));
    if (count > SIDE)
        multiply_keys(room, tokens, 1);
    else
        multiply_keys(room, tokens, 0);
    float scale[2 * SIDE];
    for (int64_t i = 0; i < count; i++) {
        const int64_t *apart = job->mask_stride, own = job->causal ? smaller(first + i + 1, limit) : limit;
        const uint8_t *mask = job->mask ? job->mask + batch * apart[0] + head * apart[1] + (first + i) * apart[2] : NULL;
        const float *scores = room->scores + i * room->apart;
        uint16_t *shares = room->shares + i * room->apart;
        scale[i] = mask ? share_out(scores, shares, mask, own, tokens, job->scaling)
                        : share_out(scores, shares, NULL, own, tokens, job->scaling);
    }
    for (int64_t i = 0; i < count; i++) {
        if (i % SIDE == 0)
            multiply_values(room, room->shares + i * room->apart, tokens);
        uint16_t *to = (uint16_t *)job->output + ((batch * job->count + first + i) * heads + head) * job->width;
        const float *sums = room->sums + i % SIDE * room->width;
        for (int64_t channel = 0; channel < job->width; channel += SIDE) {
            const __mmask16 some = (__mmask16)((1u << smaller(SIDE, job->width - channel)) - 1);
            const __m512 values = _mm512_mul_ps(_mm512_load_ps(sums + channel), _mm512_set1_ps(scale[i]));
            _mm256_mask_storeu_epi16(to + channel, some, (__m256i)_mm512_cvtneps_pbh(values));
        }
    }
}

/* Some of the (batch, heads of the queries); those that read the same keys follow each other. */
static void attend_tiles(const void *argument, int64_t first, int64_t last)
{
    const struct attend_many *job = argument;
    const int64_t tokens = (job->length + STEP - 1) / STEP * STEP, width = (job->width + STEP - 1) / STEP * STEP;
    const int64_t apart = tokens + STEP, heads = job->heads * job->group;
    /* keys, values, query; scores and shares; sums: all are multiples of 64 bytes */
    const int64_t bytes = 4 * tokens * width + 4 * SIDE * width + 12 * SIDE * apart + 4 * SIDE * width;
    char *memory = aligned_alloc(64, (size_t)bytes);
    if (!memory) {
        report_bad(job->bad);
        return;
    }
    struct attention_room room = {.tokens = tokens, .width = width, .apart = apart};
    room.keys = (uint16_t *)memory;
    room.values = room.keys + tokens * width;
    room.query = room.values + tokens * width;
    room.scores = (float *)(room.query + 2 * SIDE * width);
    room.shares = (uint16_t *)(room.scores + 2 * SIDE * apart);
    room.sums = (float *)(room.shares + 2 * SIDE * apart);
    memset(room.query, 0, (size_t)(4 * SIDE * width));
    memset(room.shares, 0, (size_t)(4 * SIDE * apart));
    use_whole_tiles();
    for (int64_t item = first, laid_out = -1; item < last; item++) {
        const int64_t batch = item / heads, head = item % heads, read = head / job->group;
        if (laid_out != item / job->group) {
            laid_out = item / job->group;
            lay_out_keys(job, (const uint16_t *)job->key + batch * job->key_stride[0] + read * job->key_stride[1], &room);
            lay_out_values(job, (const uint16_t *)job->value + batch * job->value_stride[0] + read * job->value_stride[1], &room);
        }
        for (int64_t query = 0; query < job->count; query += 2 * SIDE)
            attend_queries(job, batch, head, query, &room);
    }
    _tile_release();
    free(memory);
}
