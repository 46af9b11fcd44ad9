/* Layers between products with AVX-512: divisions of vectors take longer than all the rest. */
static ALWAYS_INLINE lanes reciprocal(lanes x, const int exact)
{
    const lanes near = (lanes)_mm512_rcp14_ps((__m512)x);
    return exact ? near * (2.0f - x * near) : near;
}

#define HAS_RECIPROCAL
#include "elementwise/kernels.h"
