/* Attention of a few queries to the pruned cache of a layer: the definitions that all kernels share. kernels.h has the
 * kernels, for each instruction set. */
#ifndef PERMPRUNE_ATTENTION_H
#define PERMPRUNE_ATTENTION_H

#include "numbers.h"

enum { WIDEST = 256 };       /* most channels of a head */
enum { TOKENS = 32 };        /* tokens that are unpacked at a time */
enum { FAR = 64 };           /* so many tokens before the end of an array, more can be read than a token has */
enum { PART_TOKENS = 512 };  /* tokens of a part: the parts of a head are added up afterwards */
enum { ROWS = 16 };          /* rows of queries that read the tokens together */

typedef uint8_t bytes __attribute__((vector_size(LINE)));

/* Types of kept values are those of numbers.h, and CODED + i: numbers of i + 2 bits, as codes.py describes them. I8 and
 * these have a scale for each token and head. */
enum { CODED = NUMBERS, MOST_BITS = 6 };

/* What numbers of 2, 3 and 4 bits stand for: those of codes.py. */
static const int8_t numbered[3][LINE] = {
    {-127, -38, 38, 127},
    {-127, -79, -45, -14, 14, 45, 79, 127},
    {-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127},
};

/* What codes are: none, if all channels are kept; or a bit for every channel. */
enum channels { EVERY, BITS };

/* Keys or values of `tokens` tokens, one head after the other. Each part is an array with an entry for each token, as
 * permprune/kv/packing.py describes them. */
STRUCTURE(states, {
    const char *values;     /* (kept,), numbers of type `number`; from CODED on planes of bits of all channels */
    const uint8_t *code;    /* `code_bytes`, NULL for EVERY */
    const uint8_t *signs;   /* `sign_bytes`: of the pruned channels, NULL without amplitudes */
    const void *amplitude;  /* of type `number`, or uint8 for integers; NULL if pruned channels are zero */
    const uint16_t *scale;  /* bf16, of integers only */
    const float *level;     /* (heads, width), or NULL without amplitudes */
    int64_t tokens, width, kept, code_bytes, sign_bytes;
    int32_t number, kind;
})

/* Queries (batch, heads * group, count, width) that read `length` tokens each: `before` whole ones, then `packed` packed
 * ones, then whole ones. Index 0 of a pair is for keys, 1 for values. Strides are those of the dimensions before the
 * last, in numbers. */
STRUCTURE(attend, {
    struct states packed[2], whole[2]; /* tokens are batch * heads * those for which a head has memory */
    const int64_t *order[2];           /* (heads, width): stored channel c is channel order[c] of queries and output; or NULL */
    const void *query;
    const uint8_t *mask; /* 1 where a query reads a token; NULL for all */
    const float *added;  /* added to the scores, or NULL */
    const float *sinks;  /* (heads * group,) scores of tokens without values, or NULL */
    void *output;        /* (batch, count, heads * group, width of the values) */
    float *partial;      /* (batch, heads, parts, group * count, width of the values + 2): sums, largest score, total */
    int64_t query_stride[3], mask_stride[3], added_stride[3];
    int64_t batch, heads, group, count;
    int64_t before, packed_tokens, length, parts;
    float scaling, softcap; /* 0: scores are not capped */
    int32_t number, causal; /* the type of queries and output; whether a query reads no token after its own */
    int32_t *bad;           /* becomes 1 if a code keeps another number of channels than `kept` */
})

/* Many queries in bf16, (batch, heads * group, count, width), that read `length` whole tokens, (batch, heads, length, width). */
STRUCTURE(attend_many, {
    const void *query, *key, *value;
    const uint8_t *mask; /* (batch, heads * group, count, length), 1 where a query reads a token; NULL for all */
    void *output;        /* (batch, count, heads * group, width) */
    int64_t query_stride[3], key_stride[3], value_stride[3], mask_stride[3];
    int64_t batch, heads, group, count, length, width;
    float scaling;  /* at least 0 */
    int32_t causal; /* whether a query reads no token after its own */
    int32_t *bad;   /* becomes 1 if there is no memory */
})

/* Some packed states as floats. */
STRUCTURE(unpack_states, {
    struct states states;
    void *output; /* (batch * heads, count, width) of type `number` */
    int64_t batch, heads, first, count;
    int32_t number;
    int32_t *bad;
})

static ALWAYS_INLINE void report_bad(int32_t *bad) { __atomic_store_n(bad, 1, __ATOMIC_RELAXED); }

static ALWAYS_INLINE int has_scale(int number) { return number >= I8; }

static ALWAYS_INLINE int is_coded(int number) { return number >= CODED; }

/* Bytes of a plane of bits of `width` channels. */
static ALWAYS_INLINE int64_t plane_bytes(int64_t width) { return (width + LINE - 1) / LINE * 2; }

/* Bytes of `count` kept values. */
static ALWAYS_INLINE int64_t value_bytes(int64_t count, int number)
{
    if (is_coded(number))
        return (number - CODED + 2) * plane_bytes(count);
    return count * (number == I8 ? 1 : number == F32 ? 4 : 2);
}

#endif
