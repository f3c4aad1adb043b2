// What the glue hands to the soft-merging kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "merge_tokens.h"

namespace vitkern {

enum class SoftKind : int32_t { exponential, sigmoid, plain, l2 };

// The weight of token n in slot m is, with s = scale * logit and the state below,
//   exponential: exp(s + row_n + column_m) row_factor_n column_factor_m   sigmoid: 1 / (1 + exp(-s))
//   plain: s   l2: s column_factor_m
// and 0 where row_n is -inf: masked tokens. The state is float or double, as the kernels; the columns of a sample start
// `pitch` apart and are padded with anything finite.
struct SoftMergeProblem {
  RowsView x, logits, y;                        // [B, N, C], [B, N, M], [B, M, C]
  RowsView total, dtotal;                       // [B, M]
  RowsView dy, dx, dlogits, weight, dweight;    // weight, dweight: [B, N]
  SoftKind kind;
  bool by_slot, sinkhorn;                       // of the exponential: which axis its sums run over
  int64_t batch, pitch, width_pitch;            // pitch: M, width_pitch: C, to whole vectors
  int32_t tokens, slots, width, rounds;
  double scale, floor;                          // floor: what sums are divided by at least; 0: they are not divided
  void *row, *row_factor, *next_row;            // [B][N]; rows() writes next_row
  void *column, *column_factor;                 // [B][pitch]; columns() writes both
  void *sum;                                    // [B][pitch]: the sum of the weights of a slot
  void *upstream, *upstream_t;                  // [B][M][width_pitch], [B][C][pitch]: dy over the divisor
  void *shift, *dot;                            // [B][pitch]: what is taken off <x, dy>; sum over n of W times the rest
  void *rows, *columns;                         // Sinkhorn: v of rounds 0.. as [rounds + 1][B][N], u as [rounds][B][pitch]
  void *drows, *dcolumns;                       // and their gradients
  void *drow, *dcolumn, *next_drow;             // those of the round at hand
  bool last_round;
};

// One unit of work of one sample: a block of slots, of tokens, or (forward) of slots and channels. `scratch` is aligned to
// 64 bytes, zero, and holds scratch_bytes(p).
using SoftMergeUnit = void (*)(const SoftMergeProblem& p, int64_t sample, int32_t unit, void* scratch);
struct SoftMergeKernels {
  int64_t (*scratch_bytes)(const SoftMergeProblem& p);
  int32_t (*slot_units)(const SoftMergeProblem& p);
  int32_t (*token_units)(const SoftMergeProblem& p);
  int32_t (*forward_units)(const SoftMergeProblem& p);
  SoftMergeUnit columns, rows;                    // the state
  SoftMergeUnit forward, sums;                    // y and sum; sum alone
  SoftMergeUnit pack, row_dots, backward;         // upstream, shift, dot; Sinkhorn's drow of the last round; gradients
  SoftMergeUnit sinkhorn_columns, sinkhorn_rows;  // one round backwards
};

}  // namespace vitkern
