/* pdep, for processors without it or where it is slow. */
#ifndef PERMPRUNE_DEPOSIT_H
#define PERMPRUNE_DEPOSIT_H

#include "numbers.h"

/* Successive bits at the ones of `places`. */
static ALWAYS_INLINE uint64_t deposit(uint64_t bits, uint64_t places)
{
    if (__builtin_constant_p(places) && places == 0x1111111111111111) {
        bits &= 0xffff;
        bits = (bits | bits << 24) & 0x000000ff000000ff;
        bits = (bits | bits << 12) & 0x000f000f000f000f;
        bits = (bits | bits << 6) & 0x0303030303030303;
        return (bits | bits << 3) & places;
    }
    uint64_t found = 0;
    for (; bits && places; places &= places - 1, bits >>= 1)
        found |= bits & 1 ? places & -places : 0;
    return found;
}

/* The same for `places` with two ones among each four, by way of all groups at once. */
static ALWAYS_INLINE uint64_t deposit_pairs(uint64_t bits, uint64_t places)
{
    const uint64_t ones = 0x1111111111111111;
    bits &= 0xffffffff;
    bits = (bits | bits << 16) & 0x0000ffff0000ffff;
    bits = (bits | bits << 8) & 0x00ff00ff00ff00ff;
    bits = (bits | bits << 4) & 0x0f0f0f0f0f0f0f0f;
    bits = (bits | bits << 2) & 0x3333333333333333;
    const uint64_t first = bits & ones, second = bits >> 1 & ones, zero = places & ones, one = places >> 1 & ones;
    const uint64_t at_1 = (second & zero) | (first & ~zero);
    const uint64_t at_2 = (second & (zero | one)) | (first & ~(zero | one));
    return places & (first | at_1 << 1 | at_2 << 2 | second << 3);
}

#endif
