// merge_tokens on the CPU: slots of all samples to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>

#include "plans.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "merge_tokens";

MergeProblem prepare(const Tensor& x, const Tensor& token_map, const Tensor& perm, const Tensor& offsets,
                     const OptTensor& weight, const std::string& reduce, bool include_dst) {
  MergeProblem p{};
  check(x.dim() == 3 && x.size(0) == token_map.size(0) && x.size(1) == token_map.size(1), kOp,
        "x must have shape [B, N, C] with the plan's batch and length");
  set_plan(p, token_map, perm, offsets, x.size(2), kOp);
  p.x = as_rows(x, kOp);
  if (weight) {
    check(weight->dim() == 2 && weight->size(0) == p.batch && weight->size(1) == p.tokens, kOp, "weight must have shape [B, N]");
    p.weight = as_rows(*weight, kOp);
  }
  constexpr const char* names[] = {"mean", "sum", "max", "first", "mlerp"};
  const auto named = std::find(std::begin(names), std::end(names), reduce);
  check(named != std::end(names), kOp, "reduce must be 'mean', 'sum', 'max', 'first' or 'mlerp'");
  p.reduce = static_cast<Reduce>(named - names);
  p.include_dst = include_dst;
  return p;
}

std::tuple<Tensor, Tensor> merge_tokens_fwd(Tensor x, Tensor token_map, Tensor perm, Tensor offsets, OptTensor weight,
                                            std::string reduce, bool include_dst, std::string /*gpu*/) {
  MergeProblem p = prepare(x, token_map, perm, offsets, weight, reduce, include_dst);
  Tensor y = new_tensor({p.batch, p.slots, p.width}, p.x.dtype);
  const bool wide = weight && p.weight.dtype == Dtype::f64;
  Tensor size = new_tensor({p.batch, p.slots}, wide ? Dtype::f64 : Dtype::f32);
  p.y = as_rows(y, kOp);
  p.size = as_rows(size, kOp);
  const MergeKernels& kernels = merge_kernels_for(p.x.dtype);
  over_rows(p, kernels, p.slots, size_of(p.x.dtype), kernels.forward);
  return {y, size};
}

std::tuple<OptTensor, OptTensor> merge_tokens_bwd(OptTensor dy, OptTensor dsize, Tensor /*size*/, Tensor x,
                                                  Tensor token_map, Tensor perm, Tensor offsets, OptTensor weight,
                                                  std::string reduce, bool include_dst, std::string /*gpu*/, int64_t need) {
  MergeProblem p = prepare(x, token_map, perm, offsets, weight, reduce, include_dst);
  OptTensor dx, dweight;
  if (need & 1) p.dx = as_rows(*(dx = new_tensor({p.batch, p.tokens, p.width}, p.x.dtype)), kOp);
  if (need & 2 && weight) p.dweight = as_rows(*(dweight = new_tensor({p.batch, p.tokens}, p.weight.dtype)), kOp);
  if (dy) p.dy = as_rows(*dy, kOp);
  if (dsize) p.dsize = as_rows(*dsize, kOp);
  const MergeKernels& kernels = merge_kernels_for(p.x.dtype);
  over_rows(p, kernels, p.slots, size_of(p.x.dtype), kernels.backward);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("merge_tokens_fwd", TORCH_BOX(&merge_tokens_fwd));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens_fwd));
  m.impl("merge_tokens_bwd", TORCH_BOX(&merge_tokens_bwd));
}

}  // namespace vitkern
