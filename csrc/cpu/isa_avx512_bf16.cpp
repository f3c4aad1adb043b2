// AVX-512 with bf16 dot products.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define VITKERN_X86
#define VITKERN_PAIRS
#endif
#define VITKERN_ISA avx512_bf16
#define VITKERN_LANES 16
#include "kernels.inc"
