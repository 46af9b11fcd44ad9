/* The products of one pair of numbers: `product_KIND` for packed weights, and `dense_KIND` for benchmarks.
 *
 * Expects KIND; WEIGHT and STAGED, the numbers of weight and activations in memory; LANES; the types VECTOR and SUM;
 * LOAD(const STAGED *), a VECTOR; KEPT(const WEIGHT *), the next LANES values, a VECTOR; EXPAND(const WEIGHT *, uint64_t
 * bits), the next values put where `bits` has ones and zeros between, which may read LANES values; ZERO(),
 * FMA(SUM, VECTOR, VECTOR) and TOTAL(SUM).
 *
 * Where activations can be picked by an index, also the type INDEX; INDICES(uint64_t bits), where the ones stand among
 * 2 LANES channels; PICK(VECTOR, INDEX, VECTOR); and PICK_FROM, the batch from which that is the quicker way.
 */
#define MASK_WORD mask_word
#define AHEAD (WORD / 2) /* values to fetch early, of those that a word keeps in the usual patterns */
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
    if (job->weights->half && job->staged->batch >= PICK_FROM) {
        PASTE(pick_, KIND)(job, first, last);
        return;
    }
#endif
    PASTE(expand_, KIND)(job, first, last);
}

#undef KIND
#undef WEIGHT
#undef KEPT
