/* The search kernels, for processors with AVX-512. */
#if defined(__x86_64__)
#include "search/search.h"
#include <math.h>
#include <stdlib.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,bmi,bmi2,popcnt")

#define NAME avx512
#include "adam/avx512.h"
#include "search/kernels.h"

END_TARGET
#endif
