// Every PTX instruction of the kernels, behind a small function whose comment says what it does.
//
// Compiled by nvcc the bodies are PTX; compiled as plain C++ the same functions come from tests/cpp/emulator, which
// runs the kernels on a CPU. Elements of two bytes travel as raw bits: T is Bf16 or Half and names their format.
#pragma once
#include <stdint.h>

#ifndef __CUDACC__
#include "emulator.h"
#else

namespace vitkern {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

// The dynamic shared memory of the block, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char vitkern_dynamic_shared[];
  return vitkern_dynamic_shared;
}

// The 32-bit address by which PTX names a place in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return uint32_t(__cvta_generic_to_shared(place));
}

// Two floats rounded to nearest even and packed: `low` in bits 0-15, `high` in bits 16-31.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<Bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack2<Half>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The inverse of pack2, exact: x is the low half, y the high one.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack2<Bf16>(uint32_t both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<Half>(uint32_t both) {
  float2 r;
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(r.x), "=f"(r.y) : "r"(both));
  return r;
}

// c += A B for a 16x16 A, a 16x8 B and a 16x8 c in float32. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0] (g, 2t..)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8, 2t+8..)      two neighbours of a row each
//   b0 (2t.., g)    b1 (2t+8.., g)                                             two neighbours of a column each
//   c[0], c[1] (g, 2t), (g, 2t+1)    c[2], c[3] (g+8, 2t), (g+8, 2t+1)
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define VITKERN_MMA(T, type)                                                                                       \
  template <>                                                                                                      \
  __device__ __forceinline__ void mma_16x8x16<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                            \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                      \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
  }
VITKERN_MMA(Bf16, "bf16")
VITKERN_MMA(Half, "f16")
#undef VITKERN_MMA

// c += A B for a 16x8 A and an 8x8 B of tf32 bits (float32 of which the low 13 bits are ignored).
//   a[0] (g, t)  a[1] (g+8, t)  a[2] (g, t+4)  a[3] (g+8, t+4)     b0 (t, g)  b1 (t+4, g)     c as above
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 2-byte elements from shared memory. Lanes 8m .. 8m+7 pass the addresses of the rows (16 bytes,
// 16-byte aligned) of matrix m; lane l receives in r[m] the elements (l / 4, 2 (l % 4)) and its right neighbour.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// The same of the transposed matrices: lane l receives the elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Starts a copy of 16 bytes from global to shared memory, both 16-byte aligned. The bytes are there for this thread
// after copy_wait_all (or the copy_wait that covers their group), for other threads after the barrier behind it.
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// The same for 4 bytes, both 4-byte aligned.
__device__ __forceinline__ void copy4_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Closes a group over the copies that this thread has started since the last group.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for every copy of this thread, in a group or not.
__device__ __forceinline__ void copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A barrier among `threads` threads of the block that name the same `id`, 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 2^x within two units in the last place; 0 at -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x with an absolute error below 2^-22; -inf at 0.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace vitkern
#endif  // __CUDACC__
