/* AVX-512 as Ice Lake and Zen 4 have it: VBMI and VBMI2 to permute and compress lanes of 8 bits, and VNNI. */
#if defined(__x86_64__)
#include "library.h"
#include "x86.h"
#include <float.h>
#include <immintrin.h>
#include <math.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt")
#include "lines.h"
#include "product/avx512.h"
#include "search/kernels.h"
#include "adam/avx512.h"
#include "adam/kernels.h"
#include "attention/avx512.h"
#include "elementwise/avx512.h"
END_TARGET

#define AVX512_KERNELS ALL_KERNELS, .pairs_run_here = has_avx512_bf16, .pairs = &avx512_pairs

const struct kernels avx512_kernels = {.name = "avx512", .runs_here = has_avx512, AVX512_KERNELS};

const struct kernels amx_kernels = {.name = "amx", .runs_here = has_amx_bf16, AVX512_KERNELS, .tiles = &amx_tiles};
#endif
