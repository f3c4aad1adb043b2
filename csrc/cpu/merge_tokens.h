// What the glue hands to the merging kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace vitkern {

// A tensor [B, N, C] or [B, N]: strides in elements. data is null where the tensor is absent.
struct RowsView {
  char* data;
  Dtype dtype;
  int64_t batch, token, dim;
};

enum class Reduce : int32_t { mean, sum, max, first, mlerp };

// One call. Rows named x belong to tokens, rows named y to slots.
struct MergeProblem {
  RowsView x, y, dy, dx;               // forward reads x and writes y and size; backward reads x and dy
  RowsView weight, size, dsize, dweight;
  const int32_t *token_map, *perm, *offsets;  // [B][N], [B][N], [B][slots + 1]
  int64_t batch;
  int32_t tokens, slots, width;
  Reduce reduce;
  bool include_dst;
  double fill;     // what unmerge gives a token without a slot,
  RowsView fills;  // unless its row stands here
};

// Work on slots (or, in unmerge, tokens) [first, last) of a sample; `scratch` is aligned to 64 bytes and holds
// scratch_bytes(p). backward of the last slot also clears the gradients of tokens without a slot.
struct MergeKernels {
  int64_t (*scratch_bytes)(const MergeProblem& p);
  void (*forward)(const MergeProblem& p, int64_t sample, int32_t first, int32_t last, void* scratch);
  void (*backward)(const MergeProblem& p, int64_t sample, int32_t first, int32_t last, void* scratch);
  void (*unmerge)(const MergeProblem& p, int64_t sample, int32_t first, int32_t last, void* scratch);
};

}  // namespace vitkern
