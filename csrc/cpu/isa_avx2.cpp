// AVX2 with FMA and F16C.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define VITKERN_X86
#endif
#define VITKERN_ISA avx2
#define VITKERN_LANES 8
#include "kernels.inc"
