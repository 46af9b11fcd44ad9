/* For each byte of a mask, the index of the kept value of each of its 8 channels; 128 or more means none. */
#ifndef PERMPRUNE_EXPAND_TABLE_H
#define PERMPRUNE_EXPAND_TABLE_H

#include <stdint.h>

static uint8_t expand_bytes[256][8];

__attribute__((constructor)) static void fill_expand_bytes(void)
{
    for (int bits = 0; bits < 256; bits++)
        for (int channel = 0, value = 0; channel < 8; channel++)
            expand_bytes[bits][channel] = bits >> channel & 1 ? (uint8_t)value++ : 128;
}

#endif
