// Stable-ABI tensors as the fields of chain_sum and grid_sum.
#pragma once
#include <optional>

#include "chain_sum.h"
#include "tensors.h"

namespace vitkern {

// [B, N, H, width] (a chain is one row), [B, Hs, Ws, H, width], or without the width.
inline FieldView field_of(const torch::stable::Tensor& t, bool grid, bool wide, const char* op) {
  check(t.dim() == 3 + int(grid) + int(wide), op, "a field has the axes of the map, heads, and channels where it has any");
  const auto s = t.strides();
  const int at = grid ? 2 : 1;
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, op), s[0], grid ? s[1] : 0, s[size_t(at)],
          s[size_t(at + 1)], wide ? s[size_t(at + 2)] : 1};
}
inline Dtype wider(Dtype a, Dtype b) { return a == Dtype::f64 || b == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

}  // namespace vitkern
