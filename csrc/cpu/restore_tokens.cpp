// restore_tokens on the CPU: the gather of unmerge_tokens forward and backward, the sum of merge_tokens for a mask token.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "plans.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "restore_tokens";

struct Restore {
  MergeProblem problem{};      // sizes: tokens = n, slots = K
  const int32_t* index;        // [B][K]
  std::vector<int32_t> place;  // [B][n]: where a position stands in index, K for one that does not
};

Restore prepare(const Tensor& y, const Tensor& index, int64_t n) {
  check(y.dim() == 3 && index.dim() == 2 && y.size(0) == index.size(0) && y.size(1) == index.size(1), kOp,
        "y must have shape [B, K, C] with the batch and length of index");
  check(index.scalar_type() == torch::headeronly::ScalarType::Int && index.is_contiguous() && n >= 0 && n < (int64_t(1) << 31), kOp,
        "index must be contiguous int32 [B, K]");
  Restore r;
  MergeProblem& p = r.problem;
  p.batch = y.size(0);
  p.tokens = int32_t(n);
  p.slots = int32_t(y.size(1));
  p.width = int32_t(y.size(2));
  r.index = static_cast<const int32_t*>(index.const_data_ptr());
  r.place.assign(size_t(p.batch * n), p.slots);
  bool fits = true;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int32_t o = 0; o < p.slots; ++o) {
      const int64_t at = r.index[b * p.slots + o];
      if (at == n) continue;  // nowhere
      fits &= at >= 0 && at < n && r.place[size_t(b * n + at)] == p.slots;
      if (fits) r.place[size_t(b * n + at)] = o;
    }
  check(fits, kOp, "index must hold distinct positions in [0, n), or n for a row that goes nowhere");
  return r;
}

RowsView mask_token_row(const Tensor& t, int64_t width) {
  check(t.dim() == 1 && t.size(0) == width, kOp, "mask_token must have shape [C]");
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), 0, 0, t.stride(0)};
}

// out[i] = from[map[i]] for `tokens` rows, 0 or p.fills where map[i] is `slots`.
Tensor gathered(MergeProblem p, const Tensor& from, const int32_t* map, int32_t tokens, int32_t slots, Dtype dtype) {
  Tensor out = new_tensor({p.batch, tokens, p.width}, dtype);
  p.token_map = map;
  p.tokens = tokens;
  p.slots = slots;
  p.y = as_rows(from, kOp);
  p.x = as_rows(out, kOp);
  const MergeKernels& kernels = merge_kernels_for(p.y.dtype == Dtype::f64 ? p.y.dtype : dtype);
  over_rows(p, kernels, tokens, size_of(dtype), kernels.unmerge);
  return out;
}

Tensor restore_tokens_fwd(Tensor y, Tensor index, OptTensor fill, OptTensor mask_token, int64_t n, double value,
                          std::string /*gpu*/) {
  Restore r = prepare(y, index, n);
  MergeProblem& p = r.problem;
  p.fill = value;
  if (fill) {
    check(fill->dim() == 3 && fill->size(0) == p.batch && fill->size(1) == n && fill->size(2) == p.width, kOp,
          "fill must have shape [B, n, C]");
    p.fills = as_rows(*fill, kOp);
  }
  if (mask_token) p.fills = mask_token_row(*mask_token, p.width);
  return gathered(p, y, r.place.data(), p.tokens, p.slots, dtype_of(y, kOp));
}

// sum over the missing positions of every sample, then over the samples, in this order
Tensor mask_token_gradient(const Restore& r, const Tensor& dout, Dtype dtype) {
  MergeProblem p = r.problem;
  const int64_t n = p.tokens;
  std::vector<int32_t> perm(size_t(p.batch * n)), offsets(size_t(2 * p.batch), 0), all(size_t(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t& count = offsets[size_t(2 * b + 1)];
    for (int32_t i = 0; i < n; ++i)
      if (r.place[size_t(b * n + i)] == p.slots) perm[size_t(b * n + count++)] = i;
    all[size_t(b)] = int32_t(b);
  }
  const Dtype wide = dtype == Dtype::f64 || dtype_of(dout, kOp) == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  Tensor partial = new_tensor({1, p.batch, p.width}, wide), sum = new_tensor({p.width}, dtype);
  p.slots = 1;
  p.reduce = Reduce::sum;
  p.include_dst = true;
  p.perm = perm.data();
  p.offsets = offsets.data();
  p.x = as_rows(dout, kOp);
  p.y = as_rows(partial, kOp);
  p.y.batch = p.width;
  const MergeKernels& kernels = merge_kernels_for(wide);
  over_rows(p, kernels, 1, size_of(wide), kernels.forward);
  const int32_t ends[2] = {0, int32_t(p.batch)};
  p.tokens = int32_t(p.batch);
  p.batch = 1;
  p.perm = all.data();
  p.offsets = ends;
  p.x = as_rows(partial, kOp);
  p.y = mask_token_row(sum, p.width);
  over_rows(p, kernels, 1, size_of(wide), kernels.forward);
  return sum;
}

std::tuple<OptTensor, OptTensor, OptTensor> restore_tokens_bwd(OptTensor dout, Tensor y, Tensor index, OptTensor fill,
                                                               OptTensor mask_token, int64_t n, double /*value*/,
                                                               std::string /*gpu*/, int64_t need) {
  OptTensor dy, dfill, dmask_token;
  if (!dout) return {dy, dfill, dmask_token};
  const Restore r = prepare(y, index, n);
  const MergeProblem& p = r.problem;
  if (need & 1) dy = gathered(p, *dout, r.index, p.slots, p.tokens, dtype_of(y, kOp));
  if (need & 2 && fill) {
    std::vector<int32_t> missing(r.place.size());
    for (size_t i = 0; i < missing.size(); ++i)
      missing[i] = r.place[i] == p.slots ? int32_t(int64_t(i) % p.tokens) : p.tokens;
    dfill = gathered(p, *dout, missing.data(), p.tokens, p.tokens, dtype_of(*fill, kOp));
  }
  if (need & 4 && mask_token) dmask_token = mask_token_gradient(r, *dout, dtype_of(*mask_token, kOp));
  return {dy, dfill, dmask_token};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("restore_tokens_fwd", TORCH_BOX(&restore_tokens_fwd));
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens_fwd));
  m.impl("restore_tokens_bwd", TORCH_BOX(&restore_tokens_bwd));
}

}  // namespace vitkern
