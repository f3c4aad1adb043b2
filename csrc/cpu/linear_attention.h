// What the glue hands to the linear-attention kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "merge_tokens.h"

namespace vitkern {

// A tensor [B, Wy, wy, Wx, wx, H, D], or without D, or without H and D: strides in elements. data is null where it is absent.
struct LinearMap {
  char* data;
  Dtype dtype;
  int64_t element;  // its bytes
  int64_t batch, window_y, y, window_x, x, head, dim;
};

// cos or sin of a rotation, Acc [S|1, N, H|1, pairs]: the pairs lie side by side.
struct LinearTable {
  const void* data;
  int64_t sequence, token, head;
};

enum class Feature : int32_t { relu, elu1, identity, leaky_relu, exp, softmax, silu_norm };
enum class Divisor : int32_t { sum, mean, none, max, abs_max, subtract };

// Acc below is float, or double for double tensors. The sums of one sequence and key head, a *state*, are
//   S [depth][width_pad]   z [depth_pad]   V [width_pad]   n [1], in all state_size numbers.
struct LinearProblem {
  LinearMap q, k, v, weight, out, dout, dq, dk, dv, dweight;
  LinearMap mask;               // bool
  LinearTable cos_q, sin_q, cos_k, sin_k;
  void *dcos_q, *dsin_q, *dcos_k, *dsin_k;  // Acc [S][N][heads][pairs], packed [B][T][heads][pairs], or null
  const int32_t *cu_q, *cu_k;   // bounds of packed sequences, or null
  int64_t batch, sequences;     // of all rows
  int32_t rows, columns;        // windows, or packed sequences in columns
  int32_t q_side, k_side, q_tokens, k_tokens;  // of a window
  int32_t heads, kv_heads, inner, depth, width, inner_pad, depth_pad, width_pad;  // channels of q, features, channels of v
  int32_t block;                // tokens that are worked on at a time
  int64_t state_size;
  int32_t pairs;
  bool half, detach;
  Feature feature;
  Divisor divisor;
  double rate, eps, scale, offset;
};

// One sequence: where it lies, and its tokens.
struct LinearSequence {
  int64_t number, batch, row, column;
  int32_t q_first, q_count, k_first, k_count;
};

constexpr int32_t kLinearBlock = 64;  // the longest

// Work on tokens [first, last) of a sequence, all heads of them; `scratch` is aligned to 64 bytes, zero, and holds scratch_bytes(p). A state
// or its gradient is one per key head; `lse` Acc [kv_heads][depth_pad] belongs to the map softmax.
struct LinearKernels {
  int32_t (*padded)(int32_t n);
  int64_t (*scratch_bytes)(const LinearProblem& p);
  // largest and sum of exp(x - largest) of every channel: Acc [kv_heads][depth_pad] each
  void (*key_sums)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, void* largest, void* sum, void* scratch);
  // adds to the states
  void (*keys)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* lse, void* states, void* scratch);
  void (*queries)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* states, void* scratch);
  // adds to dstates; across: S transposed, [width][depth_pad] for each key head
  void (*query_grads)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* states, const void* across,
                      void* dstates, void* scratch);
  // across: of dS; shift: Acc [kv_heads][depth_pad], what the derivative of the softmax takes off
  void (*key_grads)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* lse, const void* shift,
                    const void* dstates, const void* across, void* scratch);
};

}  // namespace vitkern
