// What the glue hands to the kernels that sum on grids: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "chain_sum.h"

namespace vitkern {

// One call of grid_sum, or of its links.
struct GridProblem {
  FieldView a, b, c, row, col, dout;
  FieldView out;                  // Acc
  void *drow, *dcol;              // Acc [slices][B][Hs][Ws][H]: what the places change, part of each slice
  int64_t batch;
  int32_t rows, columns, heads, depth, width;
};

// One head of one sample, one slice of the columns of its state. `scratch` is aligned to 64 bytes and holds scratch_bytes(p).
struct GridKernels {
  int64_t (*scratch_bytes)(const GridProblem& p);
  void (*forward)(const GridProblem& p, int64_t sample, int32_t head, int32_t slice, void* scratch);
  void (*links)(const GridProblem& p, int64_t sample, int32_t head, int32_t slice, void* scratch);
};

}  // namespace vitkern
