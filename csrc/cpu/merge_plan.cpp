// merge_plan on the CPU: integers only, a sample to a task. Selection is a radix select, never a sort of all tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/tokens.h"
#include "radix.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr const char* kOp = "merge_plan";
enum class Order { split, score, position };

// One sample of a call: its rows of the inputs and outputs.
struct Sample {
  const float* score;
  const int32_t* dst;
  const int8_t* role;
  int32_t *token_map, *perm, *offsets;
  int64_t tokens, n_out;
};

// merged[i]: whether token i joins its partner. Returns how many do.
int64_t select(const Sample& s, int64_t most, const float* threshold, std::vector<char>& merged) {
  std::vector<uint32_t> keys;
  keys.reserve(size_t(s.tokens));
  int64_t real = 0, above = 0;
  for (int64_t i = 0; i < s.tokens; ++i) {
    real += s.role[i] != kMasked;
    if (s.role[i] != kSource || !std::isfinite(s.score[i])) continue;
    keys.push_back(ordered(s.score[i]));
    above += threshold && s.score[i] >= *threshold;
  }
  const int64_t available = int64_t(keys.size());
  int64_t count = std::min(most, available);
  if (threshold) count = std::min(count, above);
  count = std::min(std::max(count, real - s.n_out), available);
  merged.assign(size_t(s.tokens), 0);
  if (count <= 0) return 0;
  auto [least, equal] = radix_select(keys, count);
  for (int64_t i = 0; i < s.tokens; ++i) {
    if (s.role[i] != kSource || !std::isfinite(s.score[i])) continue;
    const uint32_t key = ordered(s.score[i]);
    merged[size_t(i)] = key > least || (key == least && equal-- > 0);
  }
  return count;
}

// Slots of the kept tokens, in order; returns how many there are.
int64_t number_slots(const Sample& s, Order order, const std::vector<char>& merged) {
  int64_t next = 0;
  const auto give = [&](auto wanted) {
    for (int64_t i = 0; i < s.tokens; ++i)
      if (!merged[size_t(i)] && s.role[i] != kMasked && wanted(s.role[i])) s.token_map[i] = int32_t(next++);
  };
  const auto middle = [](int8_t role) { return role == kSource || role == kBystander; };
  if (order == Order::position) {
    give([](int8_t) { return true; });
    return next;
  }
  give([](int8_t role) { return role == kProtected; });
  if (order == Order::split) {
    give(middle);
  } else {
    std::vector<uint64_t> rest;  // no finite score has the key 0
    for (int64_t i = 0; i < s.tokens; ++i) {
      if (merged[size_t(i)] || !middle(s.role[i])) continue;
      const bool scored = s.role[i] == kSource && std::isfinite(s.score[i]);
      rest.push_back(uint64_t(scored ? ordered(s.score[i]) : 0) << 32 | uint64_t(i));
    }
    sort_descending(rest);
    for (const uint64_t item : rest) s.token_map[uint32_t(item)] = int32_t(next++);
  }
  give([](int8_t role) { return role == kDestination; });
  return next;
}

// perm and offsets: the kept token of a slot, then those merged into it by position; last the tokens without a slot.
void list_slots(const Sample& s, const std::vector<char>& merged) {
  std::vector<int32_t> next(size_t(s.n_out + 2), 0);
  for (int64_t i = 0; i < s.tokens; ++i) ++next[size_t(s.token_map[i] + 1)];
  for (int64_t o = 0; o <= s.n_out; ++o) {
    next[size_t(o + 1)] += next[size_t(o)];
    s.offsets[o] = next[size_t(o)];
  }
  for (const char turn : {0, 1})
    for (int64_t i = 0; i < s.tokens; ++i)
      if (merged[size_t(i)] == turn) s.perm[next[size_t(s.token_map[i])]++] = int32_t(i);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_plan(Tensor score, Tensor dst, Tensor role, std::optional<Tensor> r,
                                                      std::optional<Tensor> threshold, int64_t most, int64_t n_out,
                                                      std::string order_name, std::string /*gpu*/) {
  check(score.dim() == 2 && score.scalar_type() == ScalarType::Float && score.is_contiguous(), kOp,
        "score must be contiguous float32 [B, N]");
  const int64_t batch = score.size(0), tokens = score.size(1);
  check(dst.scalar_type() == ScalarType::Int && dst.is_contiguous() && dst.numel() == batch * tokens, kOp,
        "dst must be contiguous int32 [B, N]");
  check(role.scalar_type() == ScalarType::Char && role.is_contiguous() && role.numel() == batch * tokens, kOp,
        "role must be contiguous int8 [B, N]");
  check(!r || (r->scalar_type() == ScalarType::Int && r->is_contiguous() && r->numel() == batch), kOp, "r must be int32 [B]");
  check(!threshold || (threshold->scalar_type() == ScalarType::Float && threshold->is_contiguous() && threshold->numel() == batch),
        kOp, "threshold must be float32 [B]");
  check(n_out >= 0 && n_out <= tokens, kOp, "n_out must lie in [0, N]");
  check(order_name == "position" || order_name == "score" || order_name == "split", kOp,
        "order must be 'split', 'score' or 'position'");
  const Order order = order_name == "position" ? Order::position : order_name == "score" ? Order::score : Order::split;
  Tensor token_map = torch::stable::empty({batch, tokens}, ScalarType::Int);
  Tensor perm = torch::stable::empty({batch, tokens}, ScalarType::Int);
  Tensor offsets = torch::stable::empty({batch, n_out + 1}, ScalarType::Int);
  Tensor lengths = torch::stable::empty({batch}, ScalarType::Int);
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(const_cast<void*>(t.const_data_ptr())); };
  const int32_t* partners = ints(dst);
  const int8_t* roles = static_cast<const int8_t*>(role.const_data_ptr());
  bool inside = true, known = true;
  for (int64_t i = 0; i < batch * tokens; ++i) {
    inside &= uint32_t(partners[i]) < uint32_t(tokens);
    known &= uint8_t(roles[i]) <= uint8_t(kMasked);
  }
  check(inside, kOp, "dst must hold positions in [0, N)");
  check(known, kOp, "role must hold 0 to 4");
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 4096 / std::max<int64_t>(tokens, 1)), [&](int64_t first, int64_t last) {
    std::vector<char> merged;
    for (int64_t b = first; b < last; ++b) {
      const Sample s{static_cast<const float*>(score.const_data_ptr()) + b * tokens, partners + b * tokens,
                     roles + b * tokens, ints(token_map) + b * tokens,
                     ints(perm) + b * tokens, ints(offsets) + b * (n_out + 1), tokens, n_out};
      const int64_t cap = r ? std::min<int64_t>(most, std::max(ints(*r)[b], 0)) : most;
      const float* least = threshold ? static_cast<const float*>(threshold->const_data_ptr()) + b : nullptr;
      select(s, cap, least, merged);
      std::fill_n(s.token_map, tokens, int32_t(n_out));  // a token that is masked, or whose partner is not kept
      const int64_t kept = number_slots(s, order, merged);
      ints(lengths)[b] = int32_t(kept);
      if (kept > n_out) continue;  // refused below
      for (int64_t i = 0; i < tokens; ++i)
        if (merged[size_t(i)] && !merged[size_t(s.dst[i])]) s.token_map[i] = s.token_map[s.dst[i]];
      list_slots(s, merged);
    }
  });
  for (int64_t b = 0; b < batch; ++b)
    if (ints(lengths)[b] > n_out) {
      const std::string kept = std::to_string(ints(lengths)[b]), slots = std::to_string(n_out);
      check(false, kOp, ("r must be at most what every sample can merge, or n_max larger: sample " + std::to_string(b) +
                         " keeps " + kept + " tokens, there are " + slots + " slots").c_str());
    }
  return {token_map, perm, offsets, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) { m.impl("merge_plan", TORCH_BOX(&merge_plan)); }

}  // namespace vitkern
