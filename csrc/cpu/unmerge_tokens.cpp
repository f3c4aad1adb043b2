// unmerge_tokens on the CPU: a gather of rows; its backward is the sum of merge_tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "plans.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "unmerge_tokens";

MergeProblem prepare(const Tensor& y, const Tensor& token_map, const Tensor& perm, const Tensor& offsets) {
  MergeProblem p{};
  check(y.dim() == 3 && y.size(0) == offsets.size(0) && y.size(1) == offsets.size(1) - 1, kOp,
        "y must have shape [B, n_out, C] with the plan's batch and slots");
  set_plan(p, token_map, perm, offsets, y.size(2), kOp);
  return p;
}

Tensor unmerge_tokens_fwd(Tensor y, Tensor token_map, Tensor perm, Tensor offsets, double fill, std::string /*gpu*/) {
  MergeProblem p = prepare(y, token_map, perm, offsets);
  p.y = as_rows(y, kOp);
  p.fill = fill;
  Tensor x = new_tensor({p.batch, p.tokens, p.width}, p.y.dtype);
  p.x = as_rows(x, kOp);
  const MergeKernels& kernels = merge_kernels_for(p.y.dtype);
  over_rows(p, kernels, p.tokens, size_of(p.y.dtype), kernels.unmerge);
  return x;
}

OptTensor unmerge_tokens_bwd(OptTensor dx, Tensor y, Tensor token_map, Tensor perm, Tensor offsets, double /*fill*/,
                             std::string /*gpu*/, int64_t need) {
  if (!dx || !(need & 1)) return OptTensor();
  MergeProblem p = prepare(y, token_map, perm, offsets);
  p.x = as_rows(*dx, kOp);
  p.reduce = Reduce::sum;
  p.include_dst = true;
  Tensor dy = new_tensor({p.batch, p.slots, p.width}, dtype_of(y, kOp));
  p.y = as_rows(dy, kOp);
  const MergeKernels& kernels = merge_kernels_for(p.y.dtype);
  over_rows(p, kernels, p.slots, size_of(p.y.dtype), kernels.forward);
  return dy;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("unmerge_tokens_fwd", TORCH_BOX(&unmerge_tokens_fwd));
  m.impl("unmerge_tokens", TORCH_BOX(&unmerge_tokens_fwd));
  m.impl("unmerge_tokens_bwd", TORCH_BOX(&unmerge_tokens_bwd));
}

}  // namespace vitkern
