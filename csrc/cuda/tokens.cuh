// What the kernels of token matching and merging share: elements, 16-byte words of them, sums over a block.
#pragma once
#include "launch.cuh"
#include "tokens.h"

namespace vitkern {

// One element as float, and back. float32 is itself; Bf16 and Half round to nearest even.
template <class T>
__device__ __forceinline__ float load_one(const T* x) { return unpack2<T>(x->bits).x; }
template <>
__device__ __forceinline__ float load_one<float>(const float* x) { return *x; }
template <class T>
__device__ __forceinline__ void store_one(T* to, float x) { to->bits = uint16_t(pack2<T>(x, 0.0f)); }
template <>
__device__ __forceinline__ void store_one<float>(float* to, float x) { *to = x; }

// The elements of 16 bytes, as floats.
template <class T>
struct Words {
  static constexpr int kCount = 8;
  static __device__ __forceinline__ void load(const T* from, float (&x)[8]) {
    const uint4 w = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack2<T>(words[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ void store(T* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                                               pack2<T>(x[6], x[7]));
  }
};
template <>
struct Words<float> {
  static constexpr int kCount = 4;
  static __device__ __forceinline__ void load(const float* from, float (&x)[4]) {
    const float4 w = *reinterpret_cast<const float4*>(from);
    x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w;
  }
  static __device__ __forceinline__ void store(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  }
};

template <class T>
__device__ __forceinline__ T* row_of(const TokenRows& rows, int sample, int at) {
  return static_cast<T*>(rows.data) + sample * rows.batch + at * rows.token;
}

// kVector elements from channel c on: a 16-byte word, or one element.
template <class T, int kVector>
__device__ __forceinline__ void load(const T* from, float (&x)[kVector]) {
  if constexpr (kVector == 1) x[0] = load_one(from);
  else Words<T>::load(from, x);
}
template <class T, int kVector>
__device__ __forceinline__ void store(T* to, const float (&x)[kVector]) {
  if constexpr (kVector == 1) store_one(to, x[0]);
  else Words<T>::store(to, x);
}

// The sum over the warps of a block of what each lane holds, and before[0] the sum over the threads before this one.
// `shared` holds one word per warp; every thread of the block calls it.
template <int kThreads>
__device__ __forceinline__ uint32_t block_scan(uint32_t x, uint32_t* shared, uint32_t* before) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t up_to = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t below = __shfl_sync(0xFFFFFFFFu, up_to, lane - d);
    if (lane >= d) up_to += below;
  }
  __syncthreads();  // the words of the last call have been read
  if (lane == 31) shared[warp] = up_to;
  __syncthreads();
  uint32_t total = 0;
  *before = up_to - x;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) *before += shared[w];
    total += shared[w];
  }
  return total;
}

}  // namespace vitkern
