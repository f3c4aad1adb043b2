// What the kernels of linear attention share: where tokens lie, features, products in pairs of tf32 numbers.
#pragma once
#include <math.h>

#include "linear_attention.h"
#include "tiles.cuh"

namespace vitkern {

// The first token of a sequence, and from there the tokens [start, stop) of one of its runs of whole tiles.
struct Run {
  int first, start, stop;
};

__device__ __forceinline__ int within(int x, int most) { return min(max(x, 0), most); }

__device__ __forceinline__ Run run_of(const TokenAxis& axis, int sequence, int part, int parts) {
  Run r{0, 0, 0};
  int count = axis.tokens;
  if (axis.bounds != nullptr) {
    r.first = within(axis.bounds[sequence], axis.tokens);
    count = max(within(axis.bounds[sequence + 1], axis.tokens) - r.first, 0);
  }
  const int tiles = (count + kLinearTile - 1) / kLinearTile, each = (tiles + parts - 1) / parts;
  r.start = min(part * each * kLinearTile, count);
  r.stop = min(r.start + each * kLinearTile, count);
  return r;
}

// Offsets: of a sequence and head, and from there of a token.
__device__ __forceinline__ int64_t head_offset(const LinearParams& p, const SequenceView& x, int sequence, int head) {
  const int window = sequence / p.columns, column = p.queries.bounds != nullptr ? 0 : sequence % p.columns;
  return window / p.rows * x.stride[0] + window % p.rows * x.stride[1] + column * x.stride[3] + head * x.stride[5];
}
__device__ __forceinline__ int64_t token_offset(const TokenAxis& axis, const SequenceView& x, int token) {
  return token / axis.side * x.stride[2] + token % axis.side * x.stride[4];
}

// The map of each x, in place; of silu_norm SiLU(x) + 1/2, not yet divided by its norm.
template <int kCount>
__device__ __forceinline__ void features(const LinearParams& p, float (&x)[kCount]) {
  switch (p.map) {
    case FeatureMap::relu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] <= 0.0f ? 0.0f : x[i];
      break;
    case FeatureMap::elu1:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] > 0.0f ? x[i] + 1.0f : exp2_approx(x[i] * kLog2E);
      break;
    case FeatureMap::leaky_relu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] > 0.0f ? x[i] : 0.01f * x[i];
      break;
    case FeatureMap::exp:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = exp2_approx(x[i] * (p.rate * kLog2E));
      break;
    case FeatureMap::silu_norm:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] / (1.0f + exp2_approx(-x[i] * kLog2E)) + 0.5f;
      break;
    case FeatureMap::identity:
      break;
  }
}

// Whether the features of elements of 16 bits are tf32 numbers themselves.
__device__ __forceinline__ bool exact_features(const LinearParams& p) {
  return p.map == FeatureMap::relu || p.map == FeatureMap::identity;
}

// x as the sum of two tf32 numbers, but for 2^-22 of it. Of NaN and infinity `low` is NaN and 0.
struct Pair {
  uint32_t high, low;
};
__device__ __forceinline__ Pair pair_of(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000u) & ~0x1FFFu;
  const float of_high = __uint_as_float(high);
  return {high, __float_as_uint(x == of_high ? 0.0f : x - of_high)};
}

}  // namespace vitkern
