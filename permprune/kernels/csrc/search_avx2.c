/* The search kernels, for processors with AVX2. */
#if defined(__x86_64__)
#include "search.h"
#include <math.h>
#include <stdlib.h>

BEGIN_TARGET("avx2,fma,popcnt")

#define NAME avx2
#include "adam_kernels.h"
#include "search_kernels.h"

END_TARGET
#endif
