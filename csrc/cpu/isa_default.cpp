// The baseline instruction set of the compiler: 128-bit vectors. A test widens them, so that the 512-bit units' tiling
// and row ends run on machines without AVX-512.
#ifndef VITKERN_BASELINE_LANES
#define VITKERN_BASELINE_LANES 4
#endif
#define VITKERN_ISA baseline
#define VITKERN_LANES VITKERN_BASELINE_LANES
#include "kernels.inc"
