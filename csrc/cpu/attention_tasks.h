// The work of attention, cut by the problem's size, and its arguments as the schema lists them.
#pragma once
#include "attention_problem.h"

// Everything from q to the name of the GPU back-end, in the order of the schema.
#define VITKERN_ATTENTION_ARGUMENTS                                                                                            \
  torch::stable::Tensor q, torch::stable::Tensor k, torch::stable::Tensor v, OptTensor bias, OptTensor key_bias, OptTensor mask, \
      OptTensor factor, OptTensor sink, OptTensor seed, OptTensor gain, OptTensor weight, OptTensor rel_y, OptTensor rel_x,      \
      OptTensor path_row, OptTensor path_col, OptTensor slope, OptTensor q_xy, OptTensor k_xy, OptTensor q_ids, OptTensor k_ids, \
      OptTensor allow, OptTensor query_weight, OptTensor cu_q, OptTensor cu_k, OptTensor pre_weight, OptTensor pre_bias,           \
      OptTensor post_weight, OptTensor post_bias, OptTensor policy, OptTensor bias_table, OptTensor gain_table,                \
      OptTensor weight_table, OptTensor later_ratio, OptTensor position_index, OptTensor position_q,                            \
      OptTensor position_k, OptTensor position_v, OptTensor early_gain, OptTensor early_weight, std::string normalizer, double scale, bool causal, \
      int64_t offset, double dropout_p, int64_t topk, std::string rule, int64_t path_width, bool path_transposed, int64_t max_q, \
      int64_t max_k, double policy_eps, bool policy_diagonal, int64_t grid_height, int64_t grid_width, int64_t grid_prefix,      \
      int64_t grid_step, std::string /*gpu*/
#define VITKERN_ATTENTION_OPTIONS                                                                                          \
  {bias, key_bias, mask, factor, sink, seed, gain, weight, rel_y, rel_x, path_row, path_col, slope, q_xy, k_xy, q_ids,     \
   k_ids, allow, query_weight, cu_q, cu_k, pre_weight, pre_bias, post_weight, post_bias, policy, bias_table, gain_table, weight_table, later_ratio, position_index,  \
   position_q, position_k, position_v, early_gain, early_weight, normalizer, scale, causal, offset, dropout_p, topk, rule, path_width,           \
   path_transposed, max_q, max_k, policy_eps, policy_diagonal, grid_height, grid_width, grid_prefix, grid_step}

namespace vitkern {

struct AttentionTask {
  int64_t sample;
  int32_t kv_head, begin, end;  // queries
};

// Every sample and kv head, or sample alone. Keys are packed anew in every task: parts of the queries only where there are few tasks.
inline std::vector<AttentionTask> attention_tasks(const AttentionCall& c, bool in_parts) {
  std::vector<AttentionTask> tasks;
  const int64_t units = int64_t(c.samples.size()) * c.units, block = c.p.block;
  for (int64_t s = 0; s < int64_t(c.samples.size()); ++s)
    for (int32_t head = 0; head < c.units; ++head) {
      const int64_t queries = c.samples[size_t(s)].queries, blocks = (queries + block - 1) / block;
      const int64_t whole = std::max<int64_t>(4, 64 / block);
      const int64_t parts = in_parts ? std::clamp<int64_t>(64 / units, 1, std::max<int64_t>(blocks / whole, 1)) : 1;
      for (int64_t i = 0; i < parts; ++i)
        tasks.push_back({s, head, int32_t(blocks * i / parts * block), int32_t(std::min(blocks * (i + 1) / parts * block, queries))});
    }
  return tasks;
}

// body(task, its number, scratch) for all, cut into pieces of about equal work.
template <typename Body>
void over_tasks(const AttentionCall& c, const std::vector<AttentionTask>& tasks, bool backward, Body body) {
  std::vector<int64_t> cuts{0};
  double all = 0, done = 0;
  const auto work = [&](const AttentionTask& t) { return double(t.end - t.begin + 8) * double(c.samples[size_t(t.sample)].keys + 8); };
  for (const AttentionTask& t : tasks) all += work(t);
  for (size_t i = 0; i < tasks.size(); ++i) {
    done += work(tasks[i]);
    if (done * 64 >= all * double(cuts.size()) || i + 1 == tasks.size()) cuts.push_back(int64_t(i) + 1);
  }
  const int64_t bytes = c.kernels->scratch_bytes(c.p, backward);
  torch::stable::parallel_for(0, int64_t(cuts.size()) - 1, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t i = cuts[size_t(first)]; i < cuts[size_t(last)]; ++i) body(tasks[size_t(i)], i, scratch.data());
  });
}

}  // namespace vitkern
