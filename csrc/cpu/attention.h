// What the glue hands to the attention kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "merge_tokens.h"

namespace vitkern {

// A tensor [B, N, H, D] or [B, N, H]: strides in elements. data is null where the tensor is absent.
struct HeadsView {
  RowsView rows;  // of head 0
  int64_t head;
};

// A score-shaped tensor [B, H, Nq, Nk]: strides in elements, 0 where it is broadcast.
struct ScoreView {
  const char* data;
  Dtype dtype;
  int64_t batch, head, row, column;
};

enum class Normalizer : int32_t { softmax, sigmoid, relu, none };

// One call. Acc below is float, or double for double tensors.
struct AttentionProblem {
  HeadsView q, k, v, out, lse, dout, dlse, dq, dk, dv;
  ScoreView bias, key_bias;  // key_bias: row is 0
  ScoreView mask;            // bool
  const double* factor;      // [heads]: of the products
  const double* sink;        // [heads] or null
  int64_t batch;
  int32_t queries, keys, heads, kv_heads, depth, width;  // depth of q and k, width of v
  int32_t padded;  // keys, rounded up to the vector length
  int32_t block;   // rows of scores worked on together
  Normalizer normalizer;
  bool causal;     // key j is seen by query i where j <= i + offset
  int64_t offset;
  double dropout_p;
  uint64_t seed;
};

// What backward leaves beside dq, dk, dv; a null pointer is not wanted. `bias` is Acc, its rows `padded` long where the bias
// has columns; strides in elements, 0 where the bias is broadcast, and it is added to. The others are of one sample and kv
// head alone: key_bias Acc [B][heads][keys], factor and sink double [B][heads].
struct AttentionSums {
  void* bias;
  int64_t bias_batch, bias_head, bias_row;
  bool bias_column;
  void* key_bias;
  double *factor, *sink;
};

// Work on queries [first, last) of one sample and one kv head; `scratch` is aligned to 64 bytes, holds
// scratch_bytes(p, backward), and is zero before its first use with p. backward takes all queries.
struct AttentionKernels {
  int64_t (*scratch_bytes)(const AttentionProblem& p, bool backward);
  void (*forward)(const AttentionProblem& p, int64_t sample, int32_t head, int32_t first, int32_t last, void* scratch);
  void (*backward)(const AttentionProblem& p, int64_t sample, int32_t head, const AttentionSums& sums, void* scratch);
};

}  // namespace vitkern
