// The parameters of feature maps as the kernels want them, rows in whole vectors, and their gradients back as tensors.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "linear_attention.h"
#include "tensors.h"

namespace vitkern {

using OptTensor = std::optional<torch::stable::Tensor>;

inline const std::vector<std::string> kFeatures = {"relu",          "elu1",         "identity", "leaky_relu",     "exp",            "softmax",
                                            "silu_norm",     "sign",         "focused_width", "focused_head", "polar",     "hedgehog_joint",
                                            "hedgehog_split", "hedgehog_exp", "favor",    "favor_relu",     "hash"};

template <typename Acc>
struct LinearPacks {
  static constexpr const char* op = "linear_attention";
  std::vector<Acc> rows, across, second, second_across, third;
  Acc factor = 1;  // what the rows were multiplied by

  // p.map and what it points to; p.inner, p.depth and their paddings are set.
  LinearPacks(LinearProblem& p, const OptTensor& map0, const OptTensor& map1, const OptTensor& map2, int32_t (*padded)(int32_t)) {
    LinearParameters& m = p.map;
    m = {};
    if (p.feature < Feature::focused_width) return;
    const bool per_channel = p.feature <= Feature::polar, hash = p.feature == Feature::hash;
    const bool favor = p.feature == Feature::favor || p.feature == Feature::favor_relu;
    check(bool(map0) && (!hash || (bool(map1) && bool(map2))) && (p.feature != Feature::polar || bool(map1)), op,
          "the feature map needs its parameters");
    m.heads = favor ? 1 : int32_t(map0->size(0));
    m.middle = per_channel ? 1 : int32_t(map0->size(favor ? 0 : 1)), m.middle_pad = padded(m.middle);
    check(m.heads == 1 || (m.heads == p.heads && p.heads == p.kv_heads), op, "the parameters must have the heads of q and of k");
    if (favor) factor = Acc(std::pow(double(p.inner), -0.25));
    rows = pack(*map0, m.heads, m.middle, p.inner, p.inner_pad, Acc(per_channel ? 1 : 0), factor);
    for (Acc& row : rows) row = per_channel ? 1 / row : row;
    if (!per_channel) across = turned(rows, m.heads, m.middle, p.inner, p.inner_pad, m.middle_pad);
    if (map1 && p.feature == Feature::polar) second = pack(*map1, m.heads, 1, p.inner, p.inner_pad, Acc(1));
    else if (map1 && hash) second = pack(*map1, m.heads, m.middle, p.depth, p.depth_pad);
    else if (map1) second = pack(*map1, m.heads, 1, m.middle, m.middle_pad);
    if (hash) {
      second_across = turned(second, m.heads, m.middle, p.depth, p.depth_pad, m.middle_pad);
      third = pack(*map2, m.heads, 1, m.middle, m.middle_pad);
    }
    const auto of_head = [&](const std::vector<Acc>& all) { return int64_t(all.size()) / m.heads; };
    m.rows_size = of_head(rows), m.second_size = of_head(second), m.third_size = of_head(third);
    const auto data = [](const std::vector<Acc>& all) { return all.empty() ? nullptr : all.data(); };
    m.rows = data(rows), m.across = data(across), m.second = data(second), m.second_across = data(second_across), m.third = data(third);
  }

  // [heads][rows][pitch] of a tensor with so many elements
  static std::vector<Acc> pack(const torch::stable::Tensor& t, int64_t heads, int64_t rows, int64_t width, int64_t pitch, Acc fill = 0,
                               Acc factor = 1) {
    check(dtype_of(t, op) == (sizeof(Acc) == 8 ? Dtype::f64 : Dtype::f32) && t.numel() == heads * rows * width, op,
          "the parameters of the feature map have another dtype or shape than its features");
    const torch::stable::Tensor whole = t.is_contiguous() ? t : torch::stable::contiguous(t);
    const Acc* from = static_cast<const Acc*>(whole.const_data_ptr());
    std::vector<Acc> to(size_t(heads * rows * pitch), fill);
    for (int64_t r = 0; r < heads * rows; ++r)
      for (int64_t c = 0; c < width; ++c) to[size_t(r * pitch + c)] = from[r * width + c] * factor;
    return to;
  }
  // [heads][width][to_pitch] from [heads][rows][pitch]
  static std::vector<Acc> turned(const std::vector<Acc>& from, int64_t heads, int64_t rows, int64_t width, int64_t pitch, int64_t to_pitch) {
    std::vector<Acc> to(size_t(heads * width * to_pitch));
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; ++c) to[size_t((h * width + c) * to_pitch + r)] = from[size_t((h * rows + r) * pitch + c)];
    return to;
  }

  // The gradient of a parameter from `all`, [slots] of the gradients of all three; of each head those from `offset` on.
  static torch::stable::Tensor gradient(const LinearProblem& p, const std::vector<Acc>& all, const torch::stable::Tensor& like, int64_t offset,
                                        int64_t width, int64_t pitch, Acc factor) {
    const LinearParameters& m = p.map;
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < like.dim(); ++axis) sizes.push_back(like.size(axis));
    torch::stable::Tensor found = new_tensor(sizes, sizeof(Acc) == 8 ? Dtype::f64 : Dtype::f32);
    Acc* to = static_cast<Acc*>(found.mutable_data_ptr());
    const int64_t each = m.rows_size + m.second_size + m.third_size, slot = m.heads * each, rows = like.numel() / m.heads / width;
    for (int64_t h = 0; h < m.heads; ++h)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; ++c) {
          Acc sum = 0;
          for (int64_t i = 0; i < int64_t(all.size()) / slot; ++i) sum += all[size_t(i * slot + h * each + offset + r * pitch + c)];
          to[(h * rows + r) * width + c] = sum * factor;
        }
    return found;
  }
};

// Of a map with parameters: the number of its features from the sizes of its tensors.
inline int32_t linear_depth(Feature feature, int32_t inner, const OptTensor& map0, const OptTensor& map1) {
  if (feature == Feature::polar) return 2 * inner;
  if (feature < Feature::hedgehog_joint) return inner;
  check(bool(map0) && (feature != Feature::hash || bool(map1)), "linear_attention", "the feature map needs its parameters");
  if (feature == Feature::favor || feature == Feature::favor_relu) return int32_t(map0->size(0));
  return feature == Feature::hash ? int32_t(map1->size(2)) : 2 * int32_t(map0->size(1));
}

}  // namespace vitkern
