/* Attention in plain C. */
static ALWAYS_INLINE lanes unpack_line(const char *from, const int number, uint32_t bits, lanes rest)
{
    for (int lane = 0, kept = 0; lane < LINE; lane++)
        if (bits >> lane & 1) {
            rest[lane] = number == I8 ? (float)(int8_t)from[kept] : read_number(from, kept, number);
            kept++;
        }
    return rest;
}

static ALWAYS_INLINE bytes look_up(const int8_t *table, bytes places)
{
    for (int i = 0; i < LINE; i++)
        places[i] = (uint8_t)table[places[i]];
    return places;
}

#include "attention/kernels.h"
