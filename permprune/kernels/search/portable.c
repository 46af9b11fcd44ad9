/* The search kernels, for every processor: its compiler knows NEON where there is no other. */
#include "search/search.h"
#include <math.h>
#include <stdlib.h>

#define NAME portable
#include "adam/kernels.h"
#include "search/kernels.h"
