// What kernels over tiles of rows share: the place of a lane in a fragment, and 16-byte chunks on their way to shared
// memory.
#pragma once
#include "launch.cuh"

namespace vitkern {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Lane {
  int thread, warp, lane, g, t;  // g = lane / 4 and t = lane % 4: the place of a lane in a fragment
};
__device__ __forceinline__ Lane lane_of(int thread) {
  const int lane = thread & 31;
  return {thread, thread >> 5, lane, lane >> 2, lane & 3};
}
__device__ __forceinline__ Lane this_lane() { return lane_of(threadIdx.x); }

// 16 bytes to shared memory: asynchronous where the source is aligned, element by element where it is not, zeros
// where there is no source.
__device__ __forceinline__ void load_chunk(void* shared, const uint16_t* source, bool vector) {
  if (source != nullptr && vector) {
    copy16_async(shared, source);
    return;
  }
  if (source == nullptr) {
    *static_cast<uint4*>(shared) = make_uint4(0, 0, 0, 0);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) static_cast<uint16_t*>(shared)[i] = source[i];
}

// 16 bytes of shared memory to global memory, element by element where the target is not aligned.
__device__ __forceinline__ void store_chunk(uint16_t* target, const void* shared, bool vector) {
  if (vector) {
    *reinterpret_cast<uint4*>(target) = *static_cast<const uint4*>(shared);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) target[i] = static_cast<const uint16_t*>(shared)[i];
}

}  // namespace vitkern
