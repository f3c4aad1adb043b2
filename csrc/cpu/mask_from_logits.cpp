// mask_from_logits on the CPU: a task is the map of one query, resized, compared and packed in one pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "mask_from_logits";

// Where the cells of one side lie between the cells of the logits: cell `first`, then `second` with the weight `share`.
template <typename Acc>
struct Between {
  std::vector<int32_t> first, second;
  std::vector<Acc> share;

  Between(int64_t from, int64_t to) {
    const Acc scale = Acc(from) / Acc(to);
    for (int64_t i = 0; i < to; ++i) {
      const Acc at = std::max(scale * (Acc(i) + Acc(0.5)) - Acc(0.5), Acc(0));
      const int64_t low = std::min(int64_t(at), from - 1);
      first.push_back(int32_t(low));
      second.push_back(int32_t(from == to ? low : std::min(low + 1, from - 1)));
      share.push_back(std::clamp(at - Acc(low), Acc(0), Acc(1)));
    }
  }
  ResizedSide side(int64_t from) const { return {first.data(), second.data(), share.data(), int32_t(from), int32_t(first.size())}; }
};

// Where the maps lie among all queries and keys; the other pairs are seen.
struct Among {
  int64_t queries, keys, first_query, first_key;
};

// Bit j of a word is byte j of 32, each 0 or 1: of eight, the product has byte j at bit 56 + j.
uint32_t packed(const uint8_t* seen) {
  uint32_t word = 0;
  for (int part = 0; part < 4; ++part) {
    uint64_t bytes;
    std::memcpy(&bytes, seen + 8 * part, sizeof bytes);
    word |= uint32_t(bytes * 0x0102040810204080u >> 56) << (8 * part);
  }
  return word;
}

template <typename Acc>
void resize(const Tensor& logits, const std::optional<Tensor>& open_rows, int64_t height, int64_t width, double threshold, bool full,
            bool inclusive, const Among& among, const ResizeKernels& kernels, uint32_t* out) {
  const Dtype dtype = dtype_of(logits, kOp);
  const int64_t rows = logits.size(2), columns = logits.size(3), cells = height * width, words = (among.keys + 31) / 32;
  const Between<Acc> down(rows, height), across(columns, width);
  const ResizeProblem problem{dtype, logits.stride(2), logits.stride(3), down.side(rows), across.side(columns), threshold, inclusive};
  const char* data = static_cast<const char*>(logits.const_data_ptr());
  torch::stable::parallel_for(0, logits.size(0) * among.queries, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(kernels.scratch_bytes(problem));
    std::vector<uint8_t> seen(static_cast<size_t>(words * 32));  // of all keys
    std::fill_n(seen.begin(), among.keys, uint8_t(1));
    uint8_t* to = seen.data() + among.first_key;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / among.queries, q = task % among.queries - among.first_query;
      bool some = q >= 0 && q < logits.size(1);
      if (some && open_rows) some = !static_cast<const uint8_t*>(open_rows->const_data_ptr())[b * open_rows->stride(0) + q * open_rows->stride(1)];
      const bool open = !some;
      if (some) some = kernels.compare(problem, data + (b * logits.stride(0) + q * logits.stride(1)) * size_of(dtype), to, scratch.data());
      if (open || (full && !some)) std::memset(to, 1, size_t(cells));
      for (int64_t n = 0; n < words; ++n) out[task * words + n] = packed(seen.data() + 32 * n);
    }
  });
}

Tensor mask_from_logits(Tensor logits, std::optional<Tensor> open_rows, int64_t height, int64_t width, double threshold, bool full,
                        bool inclusive, int64_t queries, int64_t keys, int64_t first_query, int64_t first_key, std::string /*gpu*/) {
  check(logits.dim() == 4 && height >= 0 && width >= 0, kOp, "logits must have shape [B, Q, h, w]");
  check(logits.size(2) > 0 && logits.size(3) > 0, kOp, "logits must hold a cell");
  check(!open_rows || (open_rows->dim() == 2 && open_rows->size(0) == logits.size(0) && open_rows->size(1) == logits.size(1) &&
                       open_rows->scalar_type() == torch::headeronly::ScalarType::Bool),
        kOp, "open_rows must be bool [B, Q]");
  check(first_query >= 0 && first_key >= 0 && first_query + logits.size(1) <= queries && first_key + height * width <= keys &&
            queries < (int64_t(1) << 31) && keys < (int64_t(1) << 31),
        kOp, "the maps must lie among all queries and keys");
  Tensor words = torch::stable::empty({logits.size(0), queries, (keys + 31) / 32}, torch::headeronly::ScalarType::Int);
  if (!words.numel()) return words;
  auto* out = static_cast<uint32_t*>(words.mutable_data_ptr());
  const Among among{queries, keys, first_query, first_key};
  if (dtype_of(logits, kOp) == Dtype::f64) resize<double>(logits, open_rows, height, width, threshold, full, inclusive, among, kernels().resize_f64, out);
  else resize<float>(logits, open_rows, height, width, threshold, full, inclusive, among, kernels().resize_f32, out);
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) { m.impl("mask_from_logits", TORCH_BOX(&mask_from_logits)); }

}  // namespace vitkern
