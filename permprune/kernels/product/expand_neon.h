/* A table for aarch64 that spreads kept values to the channels of a mask. */
#ifndef PERMPRUNE_EXPAND_NEON_H
#define PERMPRUNE_EXPAND_NEON_H

#include <stdint.h>

/* For four bits of a mask, the index of the byte of the kept values for each byte of four channels; 255 means none. */
static uint8_t expand_lanes[16][16];

__attribute__((constructor)) static void fill_expand_lanes(void)
{
    for (int bits = 0; bits < 16; bits++)
        for (int channel = 0, value = 0; channel < 4; channel++) {
            int kept = bits >> channel & 1;
            for (int byte = 0; byte < 4; byte++)
                expand_lanes[bits][4 * channel + byte] = (uint8_t)(kept ? 4 * value + byte : 255);
            value += kept;
        }
}

#endif
