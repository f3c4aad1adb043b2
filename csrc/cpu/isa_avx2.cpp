// AVX2 with FMA and F16C.
#pragma GCC target("avx2,fma,f16c")
#define VITKERN_ISA avx2
#define VITKERN_LANES 8
#include "kernels.inc"
