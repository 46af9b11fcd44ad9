/* The kernels for one pair of number types: `product_KIND` and, if vectors can be stored as floats, `unpack_KIND` for
 * packed weights, and `dense_KIND` for benchmarks.
 *
 * Expects KIND; WEIGHT and STAGED, the types of weight and activations in memory; LANES; the types VECTOR and SUM;
 * LOAD(const STAGED *), a VECTOR; KEPT(const WEIGHT *), the next LANES values, a VECTOR; EXPAND(const WEIGHT *, uint64_t
 * bits), the next values put where `bits` has ones and zeros between, which may read LANES values; ZERO(),
 * FMA(SUM, VECTOR, VECTOR) and TOTAL(SUM); and STORE(float *, VECTOR), where the vectors are floats.
 *
 * If activations can be picked by an index, also the type INDEX; INDICES(uint64_t bits), the positions of the ones in
 * 2 LANES channels; and PICK(VECTOR, INDEX, VECTOR). Then weights that keep half of each word are multiplied that way.
 */
#define MASK_WORD mask_word
#define AHEAD (WORD / 2) /* values to prefetch: as many as a word keeps in 2:4 */
#define WEIGHTS EXPAND
#define NAME PASTE(expand_, KIND)
#include "product.h"
#ifdef PICK
#define PICKING
#define NAME PASTE(pick_, KIND)
#include "product.h"
#undef PICKING
#endif
#undef MASK_WORD
#undef AHEAD
#undef WEIGHTS

#define MASK_WORD(mask, word) ((void)(mask), ~0ull)
#define AHEAD WORD
#define WEIGHTS(p, bits) KEPT(p)
#define NAME PASTE(dense_, KIND)
#include "product.h"
#undef MASK_WORD
#undef AHEAD
#undef WEIGHTS

static void PASTE(product_, KIND)(const struct job *job, int64_t first, int64_t last)
{
#ifdef PICK
    if (job->weights->half) {
        PASTE(pick_, KIND)(job, first, last);
        return;
    }
#endif
    PASTE(expand_, KIND)(job, first, last);
}

#ifdef STORE
static void PASTE(unpack_, KIND)(const struct job *job, int64_t first, int64_t last)
{
    const struct weights *weights = job->weights;
    const WEIGHT *end = (const WEIGHT *)weights->values + weights->rows * weights->kept;
    WEIGHT room[WORD];
    float line[WORD];
    for (int64_t row = first; row < last; row++) {
        const WEIGHT *values = (const WEIGHT *)weights->values + row * weights->kept;
        for (int64_t word = 0; word < weights->words; word++) {
            uint64_t bits = mask_word(weights->mask + row * weights->words * 8, word);
            const WEIGHT *from = readable(values, end, room, sizeof(WEIGHT));
            for (int step = 0; step < WORD; step += LANES)
                STORE(line + step, EXPAND(from + __builtin_popcountll(before(bits, step)), bits >> step));
            values += __builtin_popcountll(bits);
            write_line(job, row, word * WORD, line);
        }
    }
}
#endif

#undef KIND
#undef WEIGHT
#undef KEPT
