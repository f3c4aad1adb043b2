// What the glue hands to the kernels of depthwise convolutions: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "chain_sum.h"

namespace vitkern {

constexpr int32_t kChannelBlock = 64;  // channels of one piece of work

// One call: tokens are the cells of a map, row-major. Acc is float or double, as the kernels.
struct DepthwiseProblem {
  FieldView v, dout, out;      // [B, N, H, D]
  const void *weight, *bias;   // Acc [taps][pitch]; Acc [pitch] or null
  int64_t pitch;               // of all channels: H padded
  int32_t heads, width, padded, rows, columns, tall, wide;  // padded: the width in whole blocks; the odd sides of the kernel
};

// Rows [top, bottom) of a sample, kChannelBlock channels of a head from `first`. `scratch` is aligned to 64 bytes, zero at first, and
// holds scratch_bytes(p). `sums`: Acc [taps + 1][pitch], which dout times v, and last dout alone, is added to.
struct DepthwiseKernels {
  int64_t (*scratch_bytes)(const DepthwiseProblem& p);
  void (*forward)(const DepthwiseProblem& p, int64_t sample, int32_t head, int32_t first, int32_t top, int32_t bottom, void* scratch);
  void (*weights)(const DepthwiseProblem& p, int64_t sample, int32_t head, int32_t first, int32_t top, int32_t bottom, void* sums,
                  void* scratch);
};

}  // namespace vitkern
