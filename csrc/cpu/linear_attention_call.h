// One call of linear_attention: its checked arguments, its sequences, and the parts that each is cut in.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "linear_attention_maps.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "linear_attention";

struct LinearArguments {
  const Tensor &q, &k, &v;
  const OptTensor &key_mask, &key_weight, &cos_q, &sin_q, &cos_k, &sin_k, &cu_q, &cu_k, &map0, &map1, &map2;
  const std::string& feature_map;
  double rate;
  const std::string& normalizer;
  double eps, scale, offset;
  bool half, detach;
};

// axes: 7 of [B, Wy, wy, Wx, wx, H, D], fewer of what lacks D, or H and D.
LinearMap as_map(const Tensor& t, int64_t axes, Dtype dtype, int64_t element) {
  check(t.dim() == axes, kOp, "maps must be cut in windows, [B, Wy, wy, Wx, wx, ...]");
  const auto at = [&](int64_t axis) { return axis < axes ? t.stride(axis) : 1; };
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype, element, at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
}
LinearMap as_map(const Tensor& t, int64_t axes = 7) { return as_map(t, axes, dtype_of(t, kOp), size_of(dtype_of(t, kOp))); }

const std::vector<std::string> kDivisors = {"sum", "mean", "none", "max", "abs_max", "subtract"};
template <typename Enum>
Enum named(const std::vector<std::string>& names, const std::string& name, const char* sentence) {
  const auto at = std::find(names.begin(), names.end(), name);
  check(at != names.end(), kOp, sentence);
  return Enum(at - names.begin());
}

// One call: the problem, its sequences, and the parts that each is cut in.
struct LinearCall {
  LinearProblem p{};
  const LinearKernels* kernels;
  bool wide;
  std::vector<LinearSequence> sequences;
  std::vector<int64_t> q_parts, k_parts;  // the first part of each sequence, and how many there are in all

  LinearCall(const LinearArguments& a) {
    p.q = as_map(a.q), p.k = as_map(a.k), p.v = as_map(a.v);
    wide = p.q.dtype == Dtype::f64 || p.v.dtype == Dtype::f64;
    kernels = wide ? &vitkern::kernels().linear_f64 : &vitkern::kernels().linear_f32;
    for (int64_t axis : {0, 1, 3}) check(a.q.size(axis) == a.k.size(axis), kOp, "k must have the windows of q");
    for (int64_t axis = 0; axis < 6; ++axis) check(a.k.size(axis) == a.v.size(axis), kOp, "v must have the tokens and heads of k");
    check(a.q.size(6) == a.k.size(6) && a.k.size(5) >= 1 && a.q.size(5) % a.k.size(5) == 0, kOp,
          "k must have the head size of q, and its heads must divide those of q");
    p.batch = a.q.size(0);
    p.heads = int32_t(a.q.size(5)), p.kv_heads = int32_t(a.k.size(5));
    p.feature = named<Feature>(kFeatures, a.feature_map, "feature_map is unknown");
    p.inner = int32_t(a.q.size(6)), p.width = int32_t(a.v.size(6));
    p.depth = linear_depth(p.feature, p.inner, a.map0, a.map1);
    p.inner_pad = kernels->padded(p.inner), p.depth_pad = kernels->padded(p.depth), p.width_pad = kernels->padded(p.width);
    const int32_t exchanged = p.feature == Feature::polar ? p.depth_pad : 0;
    p.state_size = (int64_t(p.depth) * p.width_pad + p.depth_pad + p.width_pad + 1 + exchanged + 15) / 16 * 16;
    p.kept_size = p.feature == Feature::softmax ? p.depth_pad : p.feature == Feature::favor ? 1 : p.feature == Feature::hash ? 2 : 0;
    // so many tokens that their rows of all heads stay in the second-level cache
    const int64_t of_token = int64_t(wide ? 8 : 4) * p.heads * (p.inner_pad + p.width_pad);
    p.block = int32_t(std::clamp<int64_t>(262144 / of_token / 8 * 8, 16, kLinearBlock));
    p.q_side = int32_t(a.q.size(4)), p.k_side = int32_t(a.k.size(4));
    p.q_tokens = int32_t(a.q.size(2)) * p.q_side, p.k_tokens = int32_t(a.k.size(2)) * p.k_side;
    p.divisor = named<Divisor>(kDivisors, a.normalizer, "normalizer is unknown");
    p.rate = a.rate, p.eps = a.eps, p.scale = a.scale, p.offset = a.offset, p.half = a.half, p.detach = a.detach;
    if (a.key_mask) {
      check(a.key_mask->scalar_type() == torch::headeronly::ScalarType::Bool, kOp, "key_mask must be bool");
      for (int64_t axis = 0; axis < 5; ++axis) check(a.key_mask->size(axis) == a.k.size(axis), kOp, "key_mask must have the tokens of k");
      p.mask = as_map(*a.key_mask, 5, Dtype::f32, 1);
    }
    if (a.key_weight) {
      for (int64_t axis = 0; axis < 6; ++axis) check(a.key_weight->size(axis) == a.k.size(axis), kOp, "key_weight must have the shape of k");
      p.weight = as_map(*a.key_weight, 6);
    }
    bounds(a);
    tables(a);
    cut();
  }

  void bounds(const LinearArguments& a) {
    p.rows = int32_t(a.q.size(1)), p.columns = int32_t(a.q.size(3));
    if (a.cu_q && a.cu_k) {
      for (const OptTensor* cu : {&a.cu_q, &a.cu_k})
        check((*cu)->scalar_type() == torch::headeronly::ScalarType::Int && (*cu)->is_contiguous() && (*cu)->dim() == 1 &&
                  (*cu)->numel() == a.cu_q->numel() && (*cu)->numel() >= 1,
              kOp, "cu_seqlens must be contiguous int32 [sequences + 1]");
      check(a.q.size(2) == 1 && a.k.size(2) == 1 && p.rows == 1 && p.columns == 1, kOp, "packed sequences lie in one window");
      p.cu_q = static_cast<const int32_t*>(a.cu_q->const_data_ptr());
      p.cu_k = static_cast<const int32_t*>(a.cu_k->const_data_ptr());
      p.columns = int32_t(a.cu_q->numel() - 1);
      for (const auto& [cu, total] : {std::pair{p.cu_q, p.q_tokens}, std::pair{p.cu_k, p.k_tokens}}) {
        bool rising = cu[0] == 0 && cu[p.columns] == total;
        for (int32_t i = 0; i < p.columns; ++i) rising &= cu[i] <= cu[i + 1];
        check(rising, kOp, "cu_seqlens must ascend from 0 to the number of tokens");
      }
    }
    p.sequences = p.batch * p.rows * p.columns;
    for (int64_t i = 0; i < p.sequences; ++i) {
      const int64_t column = i % p.columns, row = i / p.columns % p.rows, batch = i / p.columns / p.rows;
      if (p.cu_q)
        sequences.push_back({i, batch, 0, 0, p.cu_q[column], p.cu_q[column + 1] - p.cu_q[column], p.cu_k[column],
                             p.cu_k[column + 1] - p.cu_k[column]});
      else
        sequences.push_back({i, batch, row, column, 0, p.q_tokens, 0, p.k_tokens});
    }
  }

  void tables(const LinearArguments& a) {
    if (!a.cos_q) return;
    check(bool(a.sin_q) && bool(a.cos_k) && bool(a.sin_k), kOp, "the four tables of rope come together");
    p.pairs = int32_t(a.cos_q->size(3));
    check(2 * p.pairs <= p.depth, kOp, "rope turns at most all channels");
    const auto table = [&](const Tensor& t, int64_t tokens, int64_t heads) {
      check(t.dim() == 4 && dtype_of(t, kOp) == (wide ? Dtype::f64 : Dtype::f32) && t.size(3) == p.pairs &&
                (p.pairs <= 1 || t.stride(3) == 1) && t.size(1) == tokens && (t.size(2) == 1 || t.size(2) == heads) &&
                (t.size(0) == 1 || (t.size(0) == p.sequences && !p.cu_q)),
            kOp, "tables of rope must have shape [S|1, N, H|1, pairs]");
      return LinearTable{t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1), t.size(2) == 1 ? 0 : t.stride(2)};
    };
    p.cos_q = table(*a.cos_q, p.q_tokens, p.heads), p.sin_q = table(*a.sin_q, p.q_tokens, p.heads);
    p.cos_k = table(*a.cos_k, p.k_tokens, p.kv_heads), p.sin_k = table(*a.sin_k, p.k_tokens, p.kv_heads);
  }

  // Parts of at least 256 tokens, and of so many that adding their states costs little; at most 64.
  void cut() {
    const int64_t least = std::max<int64_t>(256, (4 * int64_t(p.depth) + 63) / 64 * 64);
    const auto parts = [&](int64_t n) { return std::clamp<int64_t>((n + least - 1) / least, 1, 64); };
    q_parts = {0}, k_parts = {0};
    for (const LinearSequence& s : sequences) {
      q_parts.push_back(q_parts.back() + parts(s.q_count));
      k_parts.push_back(k_parts.back() + parts(s.k_count));
    }
  }

  // body(problem, sequence, first and last key head, scratch) for all units that few tokens are cut in.
  template <typename Body>
  void over_heads(Body body) const {
    check(p.feature < Feature::focused_width && p.feature != Feature::softmax && !p.pairs && !p.cu_q, kOp,
          "all pairs are taken of maps without parameters, neither packed nor rotated");
    const int64_t bytes = kernels->pair_bytes(p), heads = kernels->pair_heads(p), units = p.kv_heads / heads;
    torch::stable::parallel_for(0, p.sequences * units, 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes);
      for (; first < last; ++first) {
        const int64_t head = first % units * heads;
        body(p, sequences[size_t(first / units)], int32_t(head), int32_t(head + heads), scratch.data());
      }
    });
  }
  // body(sequence, first, last, number of the part, scratch) for all parts of all sequences.
  template <typename Body>
  void over(const std::vector<int64_t>& parts, bool of_keys, Body body) const {
    over(parts, of_keys, parts.back(), [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, int64_t, void* scratch) {
      body(s, first, last, i, scratch);
    });
  }
  // body(..., number of the part, slot, scratch): the parts of a slot run one after the other.
  template <typename Body>
  void over(const std::vector<int64_t>& parts, bool of_keys, int64_t slots, Body body) const {
    const int64_t bytes = kernels->scratch_bytes(p);
    torch::stable::parallel_for(0, slots, 1, [&](int64_t slot, int64_t end) {
      Scratch scratch(bytes);
      for (; slot < end; ++slot) some(parts, of_keys, parts.back() * slot / slots, parts.back() * (slot + 1) / slots, slot, scratch.data(), body);
    });
  }
  template <typename Body>
  void some(const std::vector<int64_t>& parts, bool of_keys, int64_t first, int64_t last, int64_t slot, void* scratch, Body& body) const {
      int64_t at = std::upper_bound(parts.begin(), parts.end(), first) - parts.begin() - 1;
      for (int64_t i = first; i < last; ++i) {
        while (parts[size_t(at) + 1] <= i) ++at;
        const LinearSequence& s = sequences[size_t(at)];
        const int64_t count = parts[size_t(at) + 1] - parts[size_t(at)], part = i - parts[size_t(at)];
        const int64_t blocks = ((of_keys ? s.k_count : s.q_count) + p.block - 1) / p.block;
        const int64_t begin = blocks * part / count * p.block, end = blocks * (part + 1) / count * p.block;
        body(s, int32_t(begin), int32_t(std::min<int64_t>(end, of_keys ? s.k_count : s.q_count)), i, slot, scratch);
      }
  }
};

}  // namespace

}  // namespace vitkern
