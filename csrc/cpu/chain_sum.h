// What the glue hands to the kernels that sum along chains: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace vitkern {

// [B, Hs, Ws, H, width], a chain as one row: strides in elements. data is null where the tensor is absent.
struct FieldView {
  char* data;
  Dtype dtype;
  int64_t batch, row, column, head, dim;
};

enum class Decay : int32_t { none, shared, rows, columns };  // of the state [F][C]: one number, one for each row or column

// One call of chain_sum. Acc is float or double, as the kernels.
struct ChainProblem {
  FieldView a, b, c, link, dout;
  const int32_t *order, *bounds;  // [N] or null; [S + 1]
  const void* first;              // Acc [S][H][F][C] or null: the states before the first visit
  void *last, *out;               // Acc [S][H][F][C]; [B][N][H][C]
  const void* dlast;              // Acc [S][H][F][C] or null
  void* dlink;                    // Acc [B][N][H][1|F|C], zeros at first
  int64_t batch;
  int32_t tokens, heads, depth, width, block;
  Decay decay;
  bool packed, reverse, strict;
};

// One head of one sequence, and some slices of the columns of its state: of as many as the vector has lanes each. `scratch` is aligned to
// 64 bytes and holds scratch_bytes(p, slices).
struct ChainKernels {
  int64_t (*scratch_bytes)(const ChainProblem& p, int32_t slices);
  void (*forward)(const ChainProblem& p, int64_t sequence, int32_t head, int32_t first, int32_t slices, void* scratch);
  int64_t (*links_bytes)(const ChainProblem& p);
  void (*links)(const ChainProblem& p, int64_t sequence, int32_t head, void* scratch);  // all slices
};

}  // namespace vitkern
