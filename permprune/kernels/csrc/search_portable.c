/* The search kernels, for every processor: its compiler knows NEON where there is no other. */
#include "search.h"
#include <math.h>
#include <stdlib.h>

#define NAME portable
#include "adam_kernels.h"
#include "search_kernels.h"
