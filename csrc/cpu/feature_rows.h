// What the glue hands to the kernels that make features alone: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "chain_sum.h"
#include "linear_attention.h"

namespace vitkern {

// One call. Acc is float or double, as the kernels; map has the feature, its rate and depth.
struct FeatureRowsProblem {
  FieldView x, dout, dx;               // [B, N, H, D]
  FieldView weight, dweight;           // [B, N, H], or [B, N, 1] with stride 0 along the heads
  const uint8_t* mask;                 // bool [B, N] or null
  int64_t mask_batch, mask_token;      // its strides
  void* out;                           // Acc [B][N][H][D]
  LinearProblem map;
  double scale;
  int32_t heads;
};

// Tokens [first, last) of a sample, all heads of them. `scratch` is aligned to 64 bytes, zero, and holds scratch_bytes(p).
struct FeatureRowsKernels {
  int32_t (*padded)(int32_t n);
  int64_t (*scratch_bytes)(const FeatureRowsProblem& p);
  void (*forward)(const FeatureRowsProblem& p, int64_t sample, int32_t first, int32_t last, void* scratch);
  void (*backward)(const FeatureRowsProblem& p, int64_t sample, int32_t first, int32_t last, void* scratch);
};

}  // namespace vitkern
