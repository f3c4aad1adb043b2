// The slots of a plan and the groups of threads that own them: what the kernels of merge_tokens share.
#pragma once
#include <math.h>

#include "tokens.cuh"

namespace vitkern {

constexpr int kThreads = 128, kBlocks = 4;  // of a block, on a multiprocessor: 128 registers

// The slot of this thread's group: its tokens are perm[first], perm[first + 1] ... perm[end - 1].
struct Slot {
  int sample, slot, first, end, lane;
  bool exists;
};

// Group g of the grid owns slot g % per_sample; the slot p.slots is that of the tokens without one.
template <int kGroup>
__device__ __forceinline__ Slot slot_of(const MergeParams& p, int per_sample) {
  const int64_t g = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  Slot s{};
  s.lane = threadIdx.x % kGroup;
  s.exists = g < int64_t(p.batch) * per_sample;
  if (!s.exists) return s;
  s.sample = int(g / per_sample);
  s.slot = int(g % per_sample);
  const int32_t* offsets = p.offsets + int64_t(s.sample) * (p.slots + 1);
  s.first = offsets[s.slot];
  s.end = s.slot < p.slots ? offsets[s.slot + 1] : p.tokens;
  return s;
}

__device__ __forceinline__ int token_at(const MergeParams& p, const Slot& s, int place) {
  return p.perm[int64_t(s.sample) * p.tokens + place];
}

__device__ __forceinline__ float weight_of(const MergeParams& p, const Slot& s, int token) {
  return p.weight == nullptr ? 1.0f : p.weight[int64_t(s.sample) * p.tokens + token];
}

// The first token whose weight counts, and the sum of the weights.
__device__ __forceinline__ int counted_from(const MergeParams& p, const Slot& s) {
  return p.include_dst ? s.first : min(s.first + 1, s.end);
}
__device__ __forceinline__ float total_weight(const MergeParams& p, const Slot& s) {
  float total = 0.0f;
  for (int i = counted_from(p, s); i < s.end; ++i) total += weight_of(p, s, token_at(p, s, i));
  return total;
}

// The sum over the group of x, the same in every thread; each thread of the group calls it.
// `words` holds one per warp of the block.
template <int kGroup>
__device__ __forceinline__ float group_sum(float x, float* words) {
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  if (kGroup == 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kGroup / 32; ++w) sum += words[w];
  return sum;
}

// Blocks for one group per owner, a slot or a token.
template <int kGroup>
int64_t blocks_for(const MergeParams& p, int owners) {
  return (int64_t(p.batch) * owners * kGroup + kThreads - 1) / kThreads;
}

// A warp per row where one pass of it covers the row, else a block.
template <class Start, class T>
void start_for(const MergeParams& p, void* stream) {
  constexpr int kVector = Words<T>::kCount;
  const bool narrow = p.width <= 32 * (p.vector ? kVector : 1);
  if (p.vector)
    narrow ? Start::template run<T, kVector, 32>(p, stream) : Start::template run<T, kVector, kThreads>(p, stream);
  else
    narrow ? Start::template run<T, 1, 32>(p, stream) : Start::template run<T, 1, kThreads>(p, stream);
}

template <class Start>
void start_typed(const MergeParams& p, void* stream) {
  if (p.type == TokenType::float32) return start_for<Start, float>(p, stream);
  if (p.type == TokenType::bfloat16) return start_for<Start, Bf16>(p, stream);
  return start_for<Start, Half>(p, stream);
}

}  // namespace vitkern
