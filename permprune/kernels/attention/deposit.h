/* pdep, for processors without it or where it is slow. */
#ifndef PERMPRUNE_DEPOSIT_H
#define PERMPRUNE_DEPOSIT_H

#include "numbers.h"

/* Successive bits at the ones of `places`. */
static ALWAYS_INLINE uint64_t deposit(uint64_t bits, uint64_t places)
{
    uint64_t found = 0;
    for (; bits && places; places &= places - 1, bits >>= 1)
        found |= bits & 1 ? places & -places : 0;
    return found;
}

#endif
