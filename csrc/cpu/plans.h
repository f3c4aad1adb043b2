// A merge plan and its rows as the kernels want them; shared by the ops that move rows.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "kernels.h"
#include "merge_tokens.h"
#include "tensors.h"

namespace vitkern {

// A tensor [B, N, C] or [B, N].
inline RowsView as_rows(const torch::stable::Tensor& t, const char* op) {
  check(t.dim() == 2 || t.dim() == 3, op, "rows must have shape [B, N, C] or [B, N]");
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, op), t.stride(0), t.stride(1),
          t.dim() == 3 ? t.stride(2) : 1};
}

// Sets sizes and plan from x-like rows [B, N, C] or y-like rows [B, n_out, C], and checks that every index is inside.
inline void set_plan(MergeProblem& p, const torch::stable::Tensor& token_map, const torch::stable::Tensor& perm,
                     const torch::stable::Tensor& offsets, int64_t width, const char* op) {
  using torch::headeronly::ScalarType;
  for (const auto* t : {&token_map, &perm, &offsets})
    check(t->dim() == 2 && t->scalar_type() == ScalarType::Int && t->is_contiguous(), op, "a plan must be contiguous int32");
  p.batch = token_map.size(0);
  p.tokens = int32_t(token_map.size(1));
  p.slots = int32_t(offsets.size(1) - 1);
  p.width = int32_t(width);
  check(p.slots >= 0 && perm.size(0) == p.batch && perm.size(1) == p.tokens && offsets.size(0) == p.batch, op,
        "token_map, perm and offsets must belong to one plan");
  p.token_map = static_cast<const int32_t*>(token_map.const_data_ptr());
  p.perm = static_cast<const int32_t*>(perm.const_data_ptr());
  p.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < p.batch * p.tokens; ++i)
    inside &= uint32_t(p.perm[i]) < uint32_t(p.tokens) && uint32_t(p.token_map[i]) <= uint32_t(p.slots);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* at = p.offsets + b * (int64_t(p.slots) + 1);
    inside &= at[0] == 0 && at[p.slots] <= p.tokens;
    for (int32_t o = 0; o < p.slots; ++o) inside &= at[o] <= at[o + 1];
  }
  check(inside, op, "the plan must hold slots in [0, n_out] and positions in [0, N)");
}

// kernel(p, sample, first, last, scratch) over `rows` rows of every sample, about 64 KiB of them to a task.
template <typename Kernel>
void over_rows(const MergeProblem& p, const MergeKernels& kernels, int64_t rows, int64_t element, Kernel kernel) {
  const int64_t task = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, p.width * element));
  const int64_t blocks = std::max<int64_t>(1, (rows + task - 1) / task);
  const int64_t bytes = kernels.scratch_bytes(p);
  torch::stable::parallel_for(0, p.batch * blocks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes, false);
    for (int64_t t = first; t < last; ++t) {
      const int64_t i = t % blocks;
      kernel(p, t / blocks, int32_t(rows * i / blocks), int32_t(rows * (i + 1) / blocks), scratch.data());
    }
  });
}

inline const MergeKernels& merge_kernels_for(Dtype t) {
  return t == Dtype::f64 ? kernels().merge_f64 : kernels().merge_f32;
}

}  // namespace vitkern
