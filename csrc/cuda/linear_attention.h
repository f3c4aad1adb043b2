// The host side of the CUDA kernels of linear attention: parameters and entry points. Plain C++, no torch, no CUDA.
#pragma once
#include <stdint.h>

#include "element.h"

namespace vitkern {

constexpr int kLinearWidth = 128;  // D and Dv at most
constexpr int kLinearTile = 64;    // tokens of a tile

enum class FeatureMap : int32_t { relu, elu1, identity, leaky_relu, exp, silu_norm };
enum class Divisor : int32_t { sum, mean, none, max, abs_max, subtract };

// A map cut in windows, [B, Wy, wy, Wx, wx, heads(, channels)]: strides in elements, of contiguous channels. `vector`
// says that every row starts on a 16-byte boundary.
struct SequenceView {
  void* data;
  int64_t stride[6];
  int32_t vector;
};

// The tokens of a sequence, `side` of them in a row of its window; or, with bounds, those of all packed sequences.
struct TokenAxis {
  const int32_t* bounds;  // [sequences + 1], or null
  int32_t tokens, side;
};

struct LinearParams {
  SequenceView q, k, v, out;
  SequenceView mask, weight;  // bool and float32; data may be null
  TokenAxis queries, keys;
  int32_t sequences, rows, columns;  // windows of a map; packed: one row, a column for each sequence
  int32_t heads, group;              // query heads, query heads per key head
  int32_t d, e;                      // widths of q and k, and of v: multiples of 8
  FeatureMap map;
  Divisor divisor;
  float rate, scale, offset, eps;
  // Sums of runs of keys, [splits][sequences][key heads] slots of `slot` floats: d + 1 rows of e + 4, S [d, e] beside z,
  // over the sum of the values beside their number.
  float* parts;
  int64_t slot;
  int32_t splits, query_splits;
  float* state;  // [sequences][key heads][d + 1][e + 1]
};

struct LinearBackwardParams {
  LinearParams p;  // out is not used, state is an input, parts have a slot for each of query_splits
  SequenceView dout, dq, dk, dv;
  SequenceView dweight;  // float32; of dq, dk, dv and dweight data may be null: not wanted
  // Of each query what multiplies its row of dout in dS, its features in dz, its row of dout in the gradient of the
  // values' sum: three maps of float32 like those of the heads of q, `apart` floats from each other.
  SequenceView factors;
  int64_t apart;
  const float* dstate;  // as state, or null
  bool detach;          // the divisor has no gradient
};

// out and state of p.
void linear_attention_forward(const LinearParams& p, Element element, void* stream);

// dq, dk, dv and dweight of b.
void linear_attention_backward(const LinearBackwardParams& b, Element element, void* stream);

}  // namespace vitkern
