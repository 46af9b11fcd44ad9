/* The search kernels, for processors with AVX2. */
#if defined(__x86_64__)
#include "search/search.h"
#include <math.h>
#include <stdlib.h>

BEGIN_TARGET("avx2,fma,popcnt")

#define NAME avx2
#include "adam/kernels.h"
#include "search/kernels.h"

END_TARGET
#endif
