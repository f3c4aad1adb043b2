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

// From focused_width on: maps with parameters.
enum class Feature : int32_t {
  relu, elu1, identity, leaky_relu, exp, softmax, silu_norm, sign,
  focused_width, focused_head, polar, hedgehog_joint, hedgehog_split, hedgehog_exp, favor, favor_relu, hash
};
enum class Divisor : int32_t { sum, mean, none, max, abs_max, subtract };

// The parameters of a map, Acc with rows in whole vectors, those of each of `heads` (or of all) one behind the other; what is not there
// is null. rows [middle][inner_pad]: one over the divisors of "focused" and "polar", the weights of "hedgehog", the vectors of "favor" (times
// D^-1/4), the anchors of "hash"; across: the same as [inner][middle_pad]. second: the powers of "polar" [inner_pad], the bias of
// "hedgehog" [middle_pad], the matrix of "hash" [middle][depth_pad], across [depth][middle_pad]. third: the mean of "hash" [middle_pad].
struct LinearParameters {
  const void *rows, *across, *second, *second_across, *third;
  int64_t rows_size, second_size, third_size;  // of one head; gradients of the three lie one behind the other, in as many
  int32_t heads, middle, middle_pad;
};

// Acc below is float, or double for double tensors. The sums of one sequence and key head, a *state*, are
//   S [depth][width_pad]   z [depth_pad]   V [width_pad]   n [1], in all state_size numbers,
// and of "polar" z with its halves exchanged [depth_pad], what the second half of the channels of v is divided by: where queries read
// the state, the rows of S are exchanged in these channels too, but with a rotation, which comes after the exchange.
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
  LinearParameters map;
  int64_t kept_size;            // of a key head: what the map rests on of all tokens
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
// or its gradient is one per key head; `kept` Acc [kv_heads][kept_size]: of "softmax" the logs of the sums of the keys [depth_pad], of
// "favor" the largest key, of "hash" the spreads of q and of k. `shift` per head: what the derivative of the softmax takes off
// [depth_pad], what the spread of "hash" leaves for every distance. Gradients of parameters are added to `sums`, [heads] of them as
// the parameters; with `spread` Acc [heads] only the gradients of the spreads are of use.
struct LinearKernels {
  int32_t (*padded)(int32_t n);
  int64_t (*scratch_bytes)(const LinearProblem& p);
  // largest and sum of exp(x - largest) of every channel: Acc [kv_heads][depth_pad] each
  void (*key_sums)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, void* largest, void* sum, void* scratch);
  // Acc [heads][2]: of "favor" the largest key, of "hash" the sum of distances; the number of valid tokens
  void (*map_sums)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, bool of_keys, void* found, void* scratch);
  // adds to the states
  void (*keys)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* kept, void* states, void* scratch);
  void (*queries)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* kept, const void* states,
                  void* scratch);
  // adds to dstates; across: S transposed, [width][depth_pad] for each key head
  void (*query_grads)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* kept, const void* shift,
                      const void* states, const void* across, void* dstates, void* sums, void* spread, void* scratch);
  // across: of dS
  void (*key_grads)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, const void* kept, const void* shift,
                    const void* dstates, const void* across, void* sums, void* spread, void* scratch);
  // Without states, by all pairs of a sequence's queries and keys: key heads [first, last), so many as pair_heads says. Scratch of pair_bytes(p).
  int32_t (*pair_heads)(const LinearProblem& p);
  int64_t (*pair_bytes)(const LinearProblem& p);
  void (*pairs)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, void* scratch);
  void (*pair_grads)(const LinearProblem& p, const LinearSequence& s, int32_t first, int32_t last, void* scratch);
};

}  // namespace vitkern
