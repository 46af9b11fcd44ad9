/* AVX2 with FMA and F16C, as every x86-64 server and desktop since 2015 has them. */
#if defined(__x86_64__)
#include "library.h"
#include "product/expand_table.h"
#include "x86.h"
#include <float.h>
#include <immintrin.h>
#include <math.h>

BEGIN_TARGET("avx2,fma,f16c,popcnt")
#include "lines.h"
#include "product/avx2.h"
#include "search/kernels.h"
#include "adam/kernels.h"
#include "attention/avx2.h"
#include "elementwise/kernels.h"
END_TARGET

const struct kernels avx2_kernels = {.name = "avx2", .runs_here = has_avx2, ALL_KERNELS};
#endif
