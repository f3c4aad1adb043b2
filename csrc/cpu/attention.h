// What the glue hands to the attention kernels: plain pointers, strides and sizes, all of one sample.
#pragma once
#include <stdint.h>

#include "merge_tokens.h"

namespace vitkern {

// A tensor [N, H, D] or [N, H]: strides in elements. data is null where the tensor is absent.
struct HeadsView {
  RowsView rows;  // of head 0
  int64_t head;
};

// A score-shaped tensor [H, Nq, Nk]: strides in elements, 0 where it is broadcast.
struct ScoreView {
  const char* data;
  Dtype dtype;
  int64_t batch, head, row, column;
};

// Integers [N].
struct IdsView {
  const int32_t* data;
  int64_t batch, token;
};

// The row of the tables that each pair has, [Nq, Nk].
struct PairsView {
  const int32_t* data;
  int64_t batch, row, column;
};

// first_key: 1 at the first largest key of a row; first_query: at the first largest query of a column.
enum class Normalizer : int32_t { softmax, sigmoid, relu, none, first_key, first_query };
// What depends on the offset on a grid alone: added to the scores, a factor of the scores, a factor of the weights.
enum Table { kBiasTable, kGainTable, kWeightTable, kTables };
// Which ids a query sees: its own, those of its row of a table, those up to its own.
enum class Rule : int32_t { none, equal, table, upto };

// One sample. Acc below is float, or double for double tensors.
struct AttentionProblem {
  HeadsView q, k, v, out, lse, dout, dlse, dq, dk, dv;
  ScoreView bias, key_bias;      // key_bias: row is 0
  ScoreView gain, weight;        // factors of the scores, and of the weights
  ScoreView early_gain, early_weight;  // the same in front of the mixtures of heads, where gain and weight are behind them
  ScoreView mask;                // bool, or words of 32 keys; strides in bytes
  bool mask_bits;                // key j is bit j % 32 of word j / 32
  ScoreView tables[kTables];     // [H, entries] of the offsets on the grid below: row is 0
  HeadsView rel_y, rel_x;        // [Nq, H, kh], [Nq, H, kw]: added to the key of row y, column x
  RowsView axis_table[2];        // or from tables [axis_rows, depth]: products with q
  int32_t axis_rows[2];
  HeadsView path_row, path_col;  // [N, H]: log-decays along rows and columns of a grid
  PairsView positions;
  HeadsView position_q, position_k;  // [Nq, H, position_count], [Nk, H, position_count], Acc: added to the scores
  ScoreView position_v;              // [H, position_count, width]: added to the values
  HeadsView query_weight, dkey_mean;  // [Nq, H], [Nk, H]
  RowsView q_xy, k_xy;           // [Nq, 2], [Nk, 2]
  RowsView policy;               // [Nk]: what the exponentials of a softmax are multiplied by
  IdsView q_ids, k_ids;
  const uint8_t* allow;          // the table of Rule::table
  int64_t allow_row, allow_column;
  int32_t allow_columns;
  const double* factor;          // [heads]: of the products
  bool learns_factor;            // its gradient is wanted
  const double* sink;            // [heads] or null
  const double* slope;           // [heads] or null: of the distance
  const double* later_ratio;     // one or null: the factor of the weights of keys behind the query's own place
  const double *pre_weight, *pre_bias, *post_weight, *post_bias;  // [heads][heads], [heads] or null: heads that mix
  int32_t queries, keys, heads, kv_heads, depth, width;  // depth of q and k, width of v
  int32_t rel_height, rel_width, path_height, path_width;
  // Keys are grid_prefix tokens and a grid, queries the same tokens and every grid_step-th place of it, grid_columns in a row.
  // An entry: (key - query) row-major in [2 height - 1][2 width - 1]; behind them prefix to grid, grid to prefix, and among prefix.
  int32_t grid_height, grid_width, grid_prefix, grid_step, grid_columns;
  int32_t position_count;
  int32_t padded;   // keys, rounded up to the vector length
  int32_t pitch;    // of rows of keys that are transposed, the same for all samples
  int32_t block;    // rows of scores worked on together
  bool scattered;   // the queries of a block see few keys, each other ones
  int32_t topk;     // 0: all keys
  Normalizer normalizer;
  Rule rule;
  bool path_transposed;
  bool causal;      // key j is seen by query i where j <= i + offset
  int64_t offset;
  double policy_eps;
  bool policy_diagonal;  // 1 in place of the policy for the query's own place
  double dropout_p;
  uint64_t seed;
  uint32_t sample, first_head;  // of the random numbers
  const int64_t* places;        // [samples][queries]: the image, times 2^32, and the token that they count, or null
};

// The sums of a score-shaped gradient: Acc, rows `padded` long where it has columns; strides in elements, 0 where it is
// broadcast. They are added to; with `once` every row comes but once, and is stored in its dtype, rows as long as there are keys.
// data is null where it is not wanted.
struct ScoreSums {
  void* data;
  int64_t head, row;
  bool column, once;
  Dtype dtype;
};

// What backward leaves beside dq, dk, dv; a null pointer is not wanted. Acc [N][heads][width] of the sample's tokens, and
// double [heads]; all are overwritten, but for path_row, path_col, position_q, position_k and later_ratio, which must be 0 before.
struct AttentionSums {
  ScoreSums bias, gain, weight, tables[kTables], position_v, early_gain, early_weight;
  void *key_bias, *rel_y, *rel_x, *path_row, *path_col, *q_xy, *k_xy, *query_weight, *policy, *position_q, *position_k;
  void* axis[2];  // Acc [heads][axis_rows][depth]
  double *factor, *sink, *slope, *later_ratio;
  double *pre_weight, *pre_bias, *post_weight, *post_bias;
};

// Whether a weight is 1 or 0, and only v gets a gradient.
static inline bool is_hard(const AttentionProblem& p) {
  return p.normalizer == Normalizer::first_key || p.normalizer == Normalizer::first_query;
}
// Whether the scores, or the weights, have a factor for every pair.
static inline bool has_gain(const AttentionProblem& p) { return p.gain.data || p.tables[kGainTable].data; }
static inline bool has_weight(const AttentionProblem& p) { return p.weight.data || p.tables[kWeightTable].data; }
static inline int32_t table_entries(const AttentionProblem& p) { return (2 * p.grid_height - 1) * (2 * p.grid_width - 1) + (p.grid_prefix ? 3 : 0); }
// Whether positions are decomposed, and from tables.
static inline bool has_axes(const AttentionProblem& p) { return p.axis_table[0].data; }
static inline bool has_relative(const AttentionProblem& p) { return p.rel_y.rows.data || has_axes(p); }
// Whether the scores or the weights of all heads mix.
static inline bool mixes(const AttentionProblem& p) { return p.pre_weight || p.pre_bias || p.post_weight || p.post_bias; }

// Work on one kv head (on all heads where they mix, then kv_head is 0), forward on queries [first, last) of it; `scratch` is aligned to 64 bytes, holds
// scratch_bytes(p, backward), also of a p with more keys. key_sums: Acc [heads][keys] or null, the weights that
// each key receives from these queries, times query_weight.
struct AttentionKernels {
  int64_t (*scratch_bytes)(const AttentionProblem& p, bool backward);
  void (*forward)(const AttentionProblem& p, int32_t kv_head, int32_t first, int32_t last, void* key_sums, void* scratch);
  void (*backward)(const AttentionProblem& p, int32_t kv_head, const AttentionSums& sums, void* scratch);
};

// Keys that are looked at together: a tile that no query of a block sees is passed over.
constexpr int32_t kKeyTile = 16;

// The bits of a row of the mask from a key on, those of its word; `column`: the step of words in bytes.
static inline uint32_t seen_bits(const char* row, int64_t column, int32_t key) {
  return uint32_t(*reinterpret_cast<const int32_t*>(row + (key >> 5) * column)) >> (key & 31);
}
constexpr uint32_t kTileBits = (uint32_t(1) << kKeyTile) - 1;

// Whether tiles of keys can be judged by the mask, and whether a row of it shows one of the tile from `begin` on.
static inline bool has_tiles(const AttentionProblem& p) { return p.mask.data && (p.mask_bits || p.mask.column == 1); }
static inline bool shows_tile(const AttentionProblem& p, const char* row, int32_t begin) {
  if (p.mask_bits) return seen_bits(row, p.mask.column, begin) & kTileBits;
  uint64_t half[2];
  __builtin_memcpy(half, row + begin, sizeof half);
  return half[0] | half[1];
}

}  // namespace vitkern
