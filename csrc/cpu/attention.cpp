// attention on the CPU: a task is a sample, a kv head and some queries.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_problem.h"
#include "attention_tasks.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;

// [B, Nk, H] from the weights that the parts of the queries give each key; the parts are added in order.
template <typename Acc>
void add_parts(const AttentionCall& c, const std::vector<AttentionTask>& tasks, const std::vector<Acc>& parts, Acc* to) {
  int64_t at = 0;
  const int32_t group = c.p.heads / c.units;
  for (const AttentionTask& t : tasks) {
    const Tokens& tokens = c.samples[size_t(t.sample)];
    const int64_t first = (c.packed ? 0 : t.sample * tokens.keys) + tokens.first_key;
    for (int32_t g = 0; g < group; ++g, at += tokens.keys)
      for (int64_t j = 0; j < tokens.keys; ++j)
        to[(first + j) * c.p.heads + t.kv_head * group + g] += parts[size_t(at + j)];
  }
}

template <typename Acc>
void forward(AttentionCall& c, void* key_mean) {
  const std::vector<AttentionTask> tasks = attention_tasks(c, c.p.normalizer != Normalizer::first_query);
  const int32_t group = c.p.heads / c.units;
  std::vector<int64_t> place{0};
  for (const AttentionTask& t : tasks) place.push_back(place.back() + (key_mean ? group * c.samples[size_t(t.sample)].keys : 0));
  std::vector<Acc> parts(size_t(place.back()));
  over_tasks(c, tasks, false, [&](const AttentionTask& t, int64_t i, void* scratch) {
    const AttentionProblem p = c.sample(t.sample);
    // the kernel counts heads from 0
    Acc* sums = key_mean ? parts.data() + place[size_t(i)] - int64_t(t.kv_head) * group * p.keys : nullptr;
    c.kernels->forward(p, t.kv_head, t.begin, t.end, sums, scratch);
  });
  if (key_mean) add_parts<Acc>(c, tasks, parts, static_cast<Acc*>(key_mean));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_fwd(VITKERN_ATTENTION_ARGUMENTS) {
  AttentionCall c(q, k, v, VITKERN_ATTENTION_OPTIONS);
  AttentionProblem& p = c.p;
  const Dtype acc = c.wide ? Dtype::f64 : Dtype::f32;
  Tensor out = new_tensor({c.batch, q.size(1), p.heads, p.width}, p.v.rows.dtype);
  Tensor lse = new_tensor({c.batch, q.size(1), p.heads}, acc);
  Tensor key_mean = new_tensor({c.batch, query_weight ? k.size(1) : 0, p.heads}, acc);
  p.out = heads_view(out);
  const auto zero = [acc](Tensor& t) {
    if (t.numel()) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel() * size_of(acc)));
  };
  if (p.normalizer == Normalizer::softmax || p.normalizer == Normalizer::first_key) p.lse = heads_view(lse);
  if (p.normalizer != Normalizer::softmax || p.policy.data) zero(lse);
  zero(key_mean);
  void* sums = p.query_weight.rows.data && key_mean.numel() ? key_mean.mutable_data_ptr() : nullptr;
  if (c.wide) forward<double>(c, sums);
  else forward<float>(c, sums);
  return {out, lse, key_mean};
}

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention", TORCH_BOX(&attention_fwd));
}

}  // namespace vitkern
