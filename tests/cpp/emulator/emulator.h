// Runs the CUDA kernels of csrc/cuda on a CPU: compile a .cu file as plain C++ with this folder on the include path.
//
// This file has the words of CUDA C++ (__global__, threadIdx, shuffles, votes, atomics), fibers.h one fiber per CUDA
// thread and the places where they wait, intrinsics.h the functions of csrc/cuda/intrinsics.cuh. What it finds and what
// it cannot find is told in docs/cuda-without-a-gpu.md.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Static shared memory of all kernels lies in one section, which every block finds full of NaN. (Not inside templates.)
#define __shared__ static __attribute__((section("vitkern_shared"), used))

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct uint3 { uint32_t x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

#include "fibers.h"
namespace emulator = vitkern::emulator;

inline void __syncthreads() { emulator::barrier("__syncthreads", 0, blockDim.x, 0); }
inline int __syncthreads_or(int x) { return emulator::barrier("__syncthreads_or", 0, blockDim.x, x != 0) != 0; }

// One lane's part in a shuffle, vote or reduction of the warp.
template <class T>
struct LaneValue {
  T in, out;
  int source;
};

// Every lane of the mask receives the value of the lane that it names.
template <class T>
inline T shuffle(const char* name, uint32_t mask, T value, int source) {
  LaneValue<T> mine{value, value, source};
  emulator::warp_collective(name, mask, &mine, [name](LaneValue<T>** lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      const int from = lanes[i]->source;
      if (from > 31) continue;  // from beyond the warp: keeps its own
      if (!lanes[from]) emulator::fail(std::string(name) + " reads a lane that takes no part");
      lanes[i]->out = lanes[from]->in;
    }
  });
  return mine.out;
}
inline int lane_id() { return int(threadIdx.x & 31); }
template <class T> inline T __shfl_sync(uint32_t mask, T x, int l) { return shuffle("__shfl_sync", mask, x, l & 31); }
template <class T> inline T __shfl_xor_sync(uint32_t mask, T x, int bits) {
  return shuffle("__shfl_xor_sync", mask, x, lane_id() ^ bits);
}
template <class T> inline T __shfl_down_sync(uint32_t mask, T x, int by) {
  return shuffle("__shfl_down_sync", mask, x, lane_id() + by);
}

// Every lane of the mask receives fold(...fold(start, x of the first lane, its number)...).
template <class T, class Fold>
inline T reduce_warp(const char* name, uint32_t mask, T value, T start, Fold fold) {
  LaneValue<T> mine{value, start, 0};
  emulator::warp_collective(name, mask, &mine, [&](LaneValue<T>** lanes) {
    T total = start;
    for (int i = 0; i < 32; ++i) total = lanes[i] ? fold(total, lanes[i]->in, i) : total;
    for (int i = 0; i < 32; ++i) if (lanes[i]) lanes[i]->out = total;
  });
  return mine.out;
}
inline uint32_t __ballot_sync(uint32_t mask, int x) {
  const auto fold = [](uint32_t all, uint32_t vote, int lane) { return all | vote << lane; };
  return reduce_warp("__ballot_sync", mask, uint32_t(x != 0), 0u, fold);
}
inline int __any_sync(uint32_t mask, int x) {
  return reduce_warp("__any_sync", mask, int(x != 0), 0, [](int a, int b, int) { return a | b; });
}
inline int __all_sync(uint32_t mask, int x) {
  return reduce_warp("__all_sync", mask, int(x != 0), 1, [](int a, int b, int) { return a & b; });
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t x) {
  return reduce_warp("__reduce_add_sync", mask, x, 0u, [](uint32_t a, uint32_t b, int) { return a + b; });
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) {
  int nothing = 0;
  emulator::warp_collective("__syncwarp", mask, &nothing, [](int**) {});
}

// One fiber runs at a time, so a plain update is atomic.
template <class T> inline T atomicAdd(T* at, T x) { const T old = *at; *at = old + x; return old; }
template <class T> inline T atomicMax(T* at, T x) { const T old = *at; *at = x > old ? x : old; return old; }
template <class T> inline T atomicExch(T* at, T x) { const T old = *at; *at = x; return old; }
template <class T> inline T atomicCAS(T* at, T is, T x) { const T old = *at; *at = old == is ? x : old; return old; }

#include "intrinsics.h"
