// What the glue hands to the k-means kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "merge_tokens.h"

namespace vitkern {

// One turn on a map of high x wide tokens whose cells, rows x columns of them, have a centre each.
struct KmeansProblem {
  RowsView x, dx;
  const bool* mask;  // [B][N], or null
  int64_t mask_batch, mask_token;
  int32_t width, pitch;  // channels, and channels padded to whole vectors
  int32_t high, wide, rows, columns;
  int32_t reach, column_reach;  // how many rows and columns away from its cell a token sees centres
  double temperature;
  // Dense, Acc: the centres that are seen, [B][k][pitch]; per row of cells the weighted sums and the weights of the centres
  // around, [B][rows][2 reach + 1][columns][pitch] and without pitch; the new centres and their weights, [B][k]...; and in
  // the backward the gradients of the new centres over their weights, [B][k][pitch].
  const void* centers;
  void *sums, *weights, *next, *total;
  const void* gradients;
};

// `gather` adds up one row of cells, `combine` the rows around one centre; `backward` writes dx of one row of cells. `scratch`
// is aligned to 64 bytes, holds scratch_bytes(p) and is zero at first.
struct KmeansKernels {
  int32_t lanes;
  int64_t (*scratch_bytes)(const KmeansProblem& p);
  void (*gather)(const KmeansProblem& p, int64_t sample, int32_t row, void* scratch);
  void (*combine)(const KmeansProblem& p, int64_t sample, int32_t centre);
  void (*backward)(const KmeansProblem& p, int64_t sample, int32_t row, void* scratch);
};

}  // namespace vitkern
