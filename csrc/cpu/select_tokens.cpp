// select_tokens on the CPU: which tokens are kept, as a plan that merge_tokens gathers by. A sample to a task.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "radix.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr const char* kOp = "select_tokens";

// One sample of a call: its rows of the inputs and outputs.
struct Sample {
  const float* score;
  const float* threshold;
  int32_t *token_map, *perm, *offsets;
  int64_t tokens, protect, most, slots;
  bool by_score, fuse;
};

// The kept tokens in the order of their slots, the first `protect` among them.
std::vector<int32_t> choose(const Sample& s) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  std::vector<uint32_t> keys;
  keys.reserve(size_t(s.tokens));
  int64_t count = std::min(s.most, s.tokens - s.protect), above = 0;
  for (int64_t i = s.protect; i < s.tokens; ++i) {
    keys.push_back(ordered(std::isnan(s.score[i]) ? none : s.score[i]));
    above += s.threshold && s.score[i] >= *s.threshold && s.score[i] > none;
  }
  if (s.threshold) count = std::min(count, above);
  std::vector<int32_t> kept(size_t(s.protect + count));
  for (int64_t i = 0; i < s.protect; ++i) kept[size_t(i)] = int32_t(i);
  if (count <= 0) return kept;
  auto [least, equal] = radix_select(keys, count);
  size_t next = size_t(s.protect);
  for (int64_t i = s.protect; i < s.tokens; ++i) {
    const uint32_t key = keys[size_t(i - s.protect)];
    if (key > least || (key == least && equal-- > 0)) kept[next++] = int32_t(i);
  }
  if (!s.by_score) return kept;
  std::vector<uint64_t> items;
  for (auto i = kept.begin() + s.protect; i != kept.end(); ++i)
    items.push_back(uint64_t(keys[size_t(*i - s.protect)]) << 32 | uint64_t(*i));
  sort_descending(items);
  std::transform(items.begin(), items.end(), kept.begin() + s.protect, [](uint64_t item) { return int32_t(uint32_t(item)); });
  return kept;
}

// token_map, perm and offsets of one sample; returns the slots in use.
int64_t plan(const Sample& s) {
  const std::vector<int32_t> kept = choose(s);
  const int64_t count = int64_t(kept.size()), n_out = s.slots + s.fuse;
  std::fill(s.token_map, s.token_map + s.tokens, int32_t(n_out));
  for (int64_t o = 0; o < count; ++o) s.token_map[s.perm[o] = kept[size_t(o)]] = int32_t(o);
  for (int64_t o = 0; o <= s.slots; ++o) s.offsets[o] = int32_t(std::min(o, count));
  int64_t next = count;
  if (s.fuse) {
    for (int64_t i = s.protect; i < s.tokens; ++i)
      if (s.token_map[i] == n_out && std::isfinite(s.score[i])) s.token_map[s.perm[next++] = int32_t(i)] = int32_t(s.slots);
    s.offsets[n_out] = int32_t(next);
  }
  for (int64_t i = s.protect; i < s.tokens; ++i)
    if (s.token_map[i] == n_out) s.perm[next++] = int32_t(i);
  return count + s.fuse;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_tokens(Tensor score, std::optional<Tensor> threshold, int64_t protect,
                                                         int64_t most, int64_t slots, bool by_score, bool fuse,
                                                         std::string /*gpu*/) {
  check(score.dim() == 2 && score.scalar_type() == ScalarType::Float && score.is_contiguous(), kOp,
        "score must be contiguous float32 [B, N]");
  const int64_t batch = score.size(0), tokens = score.size(1);
  check(!threshold || (threshold->scalar_type() == ScalarType::Float && threshold->is_contiguous() && threshold->numel() == batch),
        kOp, "threshold must be float32 [B]");
  check(protect >= 0 && protect <= tokens && most >= 0 && slots >= protect + std::min(most, tokens - protect), kOp,
        "the slots must hold the protected tokens and those that are kept");
  Tensor token_map = torch::stable::empty({batch, tokens}, ScalarType::Int);
  Tensor perm = torch::stable::empty({batch, tokens}, ScalarType::Int);
  Tensor offsets = torch::stable::empty({batch, slots + fuse + 1}, ScalarType::Int);
  Tensor lengths = torch::stable::empty({batch}, ScalarType::Int);
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(const_cast<void*>(t.const_data_ptr())); };
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 4096 / std::max<int64_t>(tokens, 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      ints(lengths)[b] = int32_t(plan({static_cast<const float*>(score.const_data_ptr()) + b * tokens,
                                       threshold ? static_cast<const float*>(threshold->const_data_ptr()) + b : nullptr,
                                       ints(token_map) + b * tokens, ints(perm) + b * tokens,
                                       ints(offsets) + b * (slots + fuse + 1), tokens, protect, most, slots, by_score, fuse}));
  });
  return {token_map, perm, offsets, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) { m.impl("select_tokens", TORCH_BOX(&select_tokens)); }

}  // namespace vitkern
