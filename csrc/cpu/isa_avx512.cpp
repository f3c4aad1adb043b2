// AVX-512 F, BW, VL, DQ.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define VITKERN_X86
#endif
#define VITKERN_ISA avx512
#define VITKERN_LANES 16
#include "kernels.inc"
