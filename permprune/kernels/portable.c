/* Plain C, for every processor. */
#include "library.h"
#include <float.h>
#include <math.h>

#undef UNROLLED
#define UNROLLED /* the code would be several times as large */

#include "lines.h"
#include "product/portable.h"
#include "search/kernels.h"
#include "adam/kernels.h"
#include "attention/portable.h"
#include "elementwise/kernels.h"

const struct kernels portable_kernels = {.name = "portable", ALL_KERNELS};
