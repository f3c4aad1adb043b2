// What the glue hands to the kernel of masks from logits: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace vitkern {

// One side of a map: cell i lies between the cells first[i] and second[i] of the logits, share[i] (Acc) of the way.
struct ResizedSide {
  const int32_t *first, *second;
  const void* share;
  int32_t from, to;
};

// The maps of a call. Acc is float or double, as the kernel.
struct ResizeProblem {
  Dtype dtype;
  int64_t row, column;  // strides of the logits
  ResizedSide down, across;
  double threshold;
  bool inclusive;
};

struct ResizeKernels {
  int64_t (*scratch_bytes)(const ResizeProblem& p);
  // `seen` [to of down][to of across]: 1 where the resized logits at `data` pass the threshold, else 0. Returns whether any does.
  bool (*compare)(const ResizeProblem& p, const char* data, uint8_t* seen, void* scratch);
};

}  // namespace vitkern
