/* NEON, which every aarch64 processor has. */
#if defined(__aarch64__)
#include "library.h"
#include "product/expand_table.h"
#include <arm_neon.h>
#include <float.h>
#include <math.h>

#include "lines.h"
#include "product/neon.h"
#include "search/kernels.h"
#include "adam/kernels.h"
#include "attention/neon.h"
#include "elementwise/kernels.h"

const struct kernels neon_kernels = {.name = "neon", ALL_KERNELS};
#endif
