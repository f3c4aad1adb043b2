// The arguments of the op attention as the kernels want them: one problem for every sample or packed sequence.
#pragma once
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vitkern {

using OptTensor = std::optional<torch::stable::Tensor>;

// The arguments of the op behind q, k and v.
struct AttentionOptions {
  OptTensor bias, key_bias, mask, factor, sink, seed, gain, weight, rel_y, rel_x, path_row, path_col, slope, q_xy, k_xy;
  OptTensor q_ids, k_ids, allow, query_weight, cu_q, cu_k, pre_weight, pre_bias, post_weight, post_bias, policy;
  OptTensor bias_table, gain_table, weight_table, later_ratio, position_index, position_q, position_k, position_v;
  OptTensor early_gain, early_weight;
  std::string normalizer;
  double scale;
  bool causal;
  int64_t offset;
  double dropout_p;
  int64_t topk;
  std::string rule;
  int64_t path_width;
  bool path_transposed;
  int64_t max_q, max_k;
  double policy_eps;
  bool policy_diagonal;
  int64_t grid_height, grid_width, grid_prefix, grid_step;
};

// The tokens of one sample or sequence among all.
struct Tokens {
  int64_t first_query, queries, first_key, keys;
};

// All of a call. `p` is of the whole tensors, its queries and keys the most of any sample.
class AttentionCall {
 public:
  AttentionProblem p{};
  const AttentionKernels* kernels;
  bool wide;       // double
  bool packed;     // sequences in one row
  int32_t units;   // tasks of a sample: its kv heads, or one where the heads mix
  int64_t batch;   // of the tensors: 1 if packed
  std::vector<Tokens> samples;

  AttentionCall(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                const AttentionOptions& options);

  // The problem of one sample.
  AttentionProblem sample(int64_t s) const;
  int64_t all_queries() const { return batch * tokens_q_; }
  int64_t all_keys() const { return batch * tokens_k_; }

 private:
  std::vector<double> factor_, sink_, slope_, later_ratio_, mixtures_[4];
  int64_t tokens_q_, tokens_k_;
  uint32_t first_image_ = 0;  // of the random numbers

  void read_scores(const AttentionOptions& o);
  void read_positions(const AttentionOptions& o);
  void read_contexts(const AttentionOptions& o);
  void read_tables(const AttentionOptions& o);
  void read_axes(const AttentionOptions& o);
  void read_ids(const AttentionOptions& o);
  void read_mixtures(const AttentionOptions& o);
  void read_sequences(const AttentionOptions& o);
  void choose_block();
};

// A tensor [B, N, H, D], or [B, N, H].
HeadsView heads_view(const torch::stable::Tensor& t);

}  // namespace vitkern
