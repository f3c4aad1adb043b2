// The baseline instruction set of the compiler: 128-bit vectors.
#define VITKERN_ISA baseline
#define VITKERN_LANES 4
#include "kernels.inc"
