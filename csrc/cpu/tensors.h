// Stable-ABI tensors as the kernels want them: strided maps, new outputs, single elements of any dtype.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "window_attention.h"

namespace vitkern {

// A sentence that names the op. Python has checked the arguments already; this is the second fence.
inline void check(bool ok, const char* op, const char* sentence) {
  if (!ok) throw std::runtime_error(std::string(op) + ": " + sentence);
}

inline Dtype dtype_of(const torch::stable::Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Dtype::f32;
    case torch::headeronly::ScalarType::Double: return Dtype::f64;
    case torch::headeronly::ScalarType::BFloat16: return Dtype::bf16;
    case torch::headeronly::ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error(std::string(op) + ": tensors must be float32, float64, bfloat16 or float16");
  }
}
inline torch::headeronly::ScalarType scalar_type(Dtype t) {
  switch (t) {
    case Dtype::f32: return torch::headeronly::ScalarType::Float;
    case Dtype::f64: return torch::headeronly::ScalarType::Double;
    case Dtype::bf16: return torch::headeronly::ScalarType::BFloat16;
    default: return torch::headeronly::ScalarType::Half;
  }
}

// A tensor [B, *L, H] (wide = 0) or [B, *L, H, D] (wide = 1) with its sizes.
struct Map {
  MapView view;
  std::vector<int64_t> lengths;
  int64_t batch, heads, width;
};

inline Map map_of(const torch::stable::Tensor& t, int64_t axes, int64_t head_dim, int64_t offset, bool wide, const char* op) {
  check(axes >= 1 && axes <= kMaxAxes, op, "a map has 1 to 4 axes");
  Map m{};
  const auto size = t.sizes();
  const auto stride = t.strides();
  m.view.dtype = dtype_of(t, op);
  m.view.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  if (m.view.data) m.view.data += offset * size_of(m.view.dtype);
  m.view.batch = stride[0];
  m.batch = size[0];
  for (int64_t a = 0; a < axes; ++a) {
    m.view.axis[a] = stride[1 + a];
    m.lengths.push_back(size[1 + a]);
  }
  m.heads = size[head_dim];
  m.view.head = stride[head_dim];
  m.width = wide ? size[head_dim + 1] : 1;
  m.view.dim = wide ? stride[head_dim + 1] : 1;
  return m;
}
inline Map as_map(const torch::stable::Tensor& t, int64_t wide, const char* op) {
  const int64_t axes = t.dim() - 2 - wide;
  return map_of(t, axes, 1 + axes, 0, wide != 0, op);
}
// Part 0, 1 or 2 of a packed tensor [B, *L, 3, H, D].
inline Map packed_map(const torch::stable::Tensor& t, int64_t part, const char* op) {
  const int64_t axes = t.dim() - 4;
  return map_of(t, axes, 2 + axes, part * t.stride(1 + axes), true, op);
}

inline torch::stable::Tensor new_tensor(const std::vector<int64_t>& sizes, Dtype dtype) {
  return torch::stable::empty(sizes, scalar_type(dtype));
}
// [B, *L, rest...] from lengths and {B, rest...}.
inline torch::stable::Tensor new_map(const std::vector<int64_t>& lengths, std::vector<int64_t> others, Dtype dtype) {
  others.insert(others.begin() + 1, lengths.begin(), lengths.end());
  return new_tensor(others, dtype);
}

// body(element) with an element of the C++ type of a dtype; `widened` makes it an Acc.
template <typename Body>
auto with_element(Dtype t, Body body) {
  if (t == Dtype::f32) return body(float());
  if (t == Dtype::f64) return body(double());
  if (t == Dtype::bf16) return body(torch::headeronly::BFloat16());
  return body(torch::headeronly::Half());
}
template <typename Acc, typename T>
Acc widened(T x) {
  if constexpr (std::is_same_v<T, double>) return Acc(x);
  else return Acc(float(x));
}
template <typename Acc>
Acc scalar(const void* data, int64_t at, Dtype t) {
  return with_element(t, [&](auto element) { return widened<Acc>(static_cast<const decltype(element)*>(data)[at]); });
}
template <typename T, typename Acc>
T narrowed(Acc x) {
  if constexpr (std::is_same_v<T, double>) return double(x);
  else return T(float(x));
}
template <typename Acc>
void set_scalar(void* data, int64_t at, Dtype t, Acc x) {
  with_element(t, [&](auto element) { static_cast<decltype(element)*>(data)[at] = narrowed<decltype(element)>(x); });
}

// Raises where an index [N, M] int32 names a row that a table of `rows` has not.
inline void check_index(const torch::stable::Tensor& index, int64_t rows, const char* op) {
  const int32_t* data = static_cast<const int32_t*>(index.const_data_ptr());
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < index.size(0); ++i)
    for (int64_t j = 0; j < index.size(1); ++j) {
      const int32_t entry = data[i * index.stride(0) + j * index.stride(1)];
      low = entry < low ? entry : low;
      high = entry > high ? entry : high;
    }
  if (low < 0 || high >= rows)
    check(false, op, ("bias.index must lie in [0, " + std::to_string(rows) + "), the rows of the table, got entries from " +
                      std::to_string(low) + " to " + std::to_string(high)).c_str());
}

// Scratch of one thread, aligned to a cache line and zero: window attention relies on zeros in the padding of its rows.
class Scratch {
 public:
  explicit Scratch(int64_t bytes, bool zero = true) : data_(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
    if (zero) std::memset(data_, 0, size_t(bytes));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace vitkern
