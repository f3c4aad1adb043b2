// soft_merge on the CPU: the state of the weights (O(N + M) numbers a sample), then products over blocks of tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "plans.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "soft_merge";

SoftMergeProblem prepare(const Tensor& x, const Tensor& logits, const OptTensor& weight, const OptTensor& mask,
                         const std::string& axis, const std::string& normalize, double scale, double renormalize, double eps,
                         int64_t iters) {
  check(x.dim() == 3 && logits.dim() == 3 && x.size(0) == logits.size(0) && x.size(1) == logits.size(1), kOp,
        "logits must have shape [B, N, M] with the batch and length of x");
  check(x.size(1) >= 1 && logits.size(2) >= 1 && iters >= 1, kOp, "there must be a token, a slot and a round");
  check(!mask || (mask->scalar_type() == torch::headeronly::ScalarType::Bool && mask->is_contiguous() &&
                  mask->numel() == x.size(0) * x.size(1)),
        kOp, "mask must be contiguous bool [B, N]");
  SoftMergeProblem p{};
  p.batch = x.size(0);
  p.tokens = int32_t(x.size(1));
  p.slots = int32_t(logits.size(2));
  p.width = int32_t(x.size(2));
  p.pitch = (p.slots + 15) / 16 * 16;
  p.width_pitch = std::max<int64_t>(16, (p.width + 15) / 16 * 16);
  p.x = as_rows(x, kOp);
  p.logits = as_rows(logits, kOp);
  if (weight) {
    check(weight->dim() == 2 && weight->size(0) == p.batch && weight->size(1) == p.tokens, kOp, "weight must have shape [B, N]");
    p.weight = as_rows(*weight, kOp);
  }
  p.sinkhorn = normalize == "sinkhorn";
  p.kind = normalize == "softmax" || p.sinkhorn ? SoftKind::exponential
           : normalize == "sigmoid"             ? SoftKind::sigmoid
           : normalize == "l2"                  ? SoftKind::l2
                                                : SoftKind::plain;
  check(p.kind != SoftKind::plain || normalize == "none", kOp,
        "normalize must be 'softmax', 'sigmoid', 'none', 'l2' or 'sinkhorn'");
  check(axis == "token" || axis == "slot", kOp, "axis must be 'token' or 'slot'");
  p.by_slot = axis == "slot";
  p.rounds = p.sinkhorn ? int32_t(iters) : 0;
  p.scale = p.sinkhorn ? scale / eps : scale;
  p.floor = renormalize;
  return p;
}

// kernel(p, sample, unit, scratch) over all units of all samples.
void over_units(const SoftMergeProblem& p, const SoftMergeKernels& kernels, int32_t units, SoftMergeUnit kernel) {
  const int64_t bytes = kernels.scratch_bytes(p);
  torch::stable::parallel_for(0, p.batch * units, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t t = first; t < last; ++t) kernel(p, t / units, int32_t(t % units), scratch.data());
  });
}

// The state arrays of a call, and the kernels that fill and use them.
template <typename Acc>
struct Run {
  SoftMergeProblem& p;
  const SoftMergeKernels& kernels;
  std::vector<Acc> rows, columns, row_factor, column_factor, sum;
  int64_t of_row, of_column;

  Run(SoftMergeProblem& problem, const OptTensor& mask) : p(problem), kernels(chosen()) {
    of_row = p.batch * p.tokens;
    of_column = p.batch * p.pitch;
    const bool more = p.sinkhorn || (p.kind == SoftKind::exponential && p.by_slot);
    rows.assign(size_t(of_row * (more ? std::max(p.rounds, 1) + 1 : 1)), Acc(0));
    columns.assign(size_t(of_column * std::max(p.rounds, 1)), Acc(0));
    row_factor.assign(size_t(of_row), Acc(1));
    column_factor.assign(size_t(of_column), Acc(1));
    sum.assign(size_t(of_column), Acc(0));
    p.row = rows.data();
    p.column = columns.data();
    p.row_factor = row_factor.data();
    p.column_factor = column_factor.data();
    p.sum = sum.data();
    const auto* real = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    if (real || p.weight.data)
      torch::stable::parallel_for(0, of_row, 16384, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t at = i / p.tokens * p.weight.batch + i % p.tokens * p.weight.token;
          const Acc w = p.weight.data ? scalar<Acc>(p.weight.data, at, p.weight.dtype) : Acc(1);
          if ((real && !real[i]) || !(w > 0)) rows[size_t(i)] = -std::numeric_limits<Acc>::infinity();
          else if (p.weight.data) rows[size_t(i)] = std::log(w);
        }
      });
    normalize();
  }

  static const SoftMergeKernels& chosen() {
    if constexpr (sizeof(Acc) == 8) return vitkern::kernels().soft_f64;
    else return vitkern::kernels().soft_f32;
  }
  void over_slots(SoftMergeUnit kernel) { over_units(p, kernels, kernels.slot_units(p), kernel); }
  void over_tokens(SoftMergeUnit kernel) { over_units(p, kernels, kernels.token_units(p), kernel); }

  void normalize() {
    if (p.kind == SoftKind::l2 || (p.kind == SoftKind::exponential && !p.by_slot && !p.sinkhorn)) over_slots(kernels.columns);
    if (p.kind != SoftKind::exponential || (!p.by_slot && !p.sinkhorn)) return;
    for (int32_t k = 0; k < std::max(p.rounds, 1); ++k) {
      p.column = columns.data() + k * of_column;
      if (p.sinkhorn) over_slots(kernels.columns);
      p.next_row = rows.data() + (k + 1) * of_row;
      over_tokens(kernels.rows);
      p.row = p.next_row;
    }
  }

  // drow and dcolumn of every round, from the last to the first.
  void sinkhorn_backward(std::vector<Acc>& drows, std::vector<Acc>& dcolumns) {
    drows.assign(rows.size(), Acc(0));
    dcolumns.assign(columns.size(), Acc(0));
    p.rows = rows.data();
    p.columns = columns.data();
    p.drows = drows.data();
    p.dcolumns = dcolumns.data();
    p.drow = drows.data() + p.rounds * of_row;
    over_tokens(kernels.row_dots);
    SoftMergeProblem now = p;
    for (int32_t k = p.rounds - 1; k >= 0; --k) {
      now.column = columns.data() + k * of_column;
      now.dcolumn = dcolumns.data() + k * of_column;
      now.row = rows.data() + (k + 1) * of_row;
      now.drow = drows.data() + (k + 1) * of_row;
      now.last_round = k == p.rounds - 1;
      over_units(now, kernels, kernels.slot_units(p), kernels.sinkhorn_columns);
      now.row = rows.data() + k * of_row;
      now.next_drow = drows.data() + k * of_row;
      if (k > 0) over_units(now, kernels, kernels.token_units(p), kernels.sinkhorn_rows);
    }
  }
};

bool wide(const SoftMergeProblem& p) { return p.x.dtype == Dtype::f64 || p.logits.dtype == Dtype::f64; }

std::tuple<Tensor, Tensor> soft_merge_fwd(Tensor x, Tensor logits, OptTensor weight, OptTensor mask, std::string axis,
                                          std::string normalize, double scale, double renormalize, double eps, int64_t iters,
                                          std::string /*gpu*/) {
  SoftMergeProblem p = prepare(x, logits, weight, mask, axis, normalize, scale, renormalize, eps, iters);
  Tensor total = new_tensor({p.batch, p.slots}, wide(p) ? Dtype::f64 : Dtype::f32);
  Tensor y = new_tensor({p.batch, p.slots, p.width}, wide(p) ? Dtype::f64 : Dtype::f32);
  p.total = as_rows(total, kOp);
  p.y = as_rows(y, kOp);
  const auto run = [&](auto acc) {
    Run<decltype(acc)> state(p, mask);
    over_units(p, state.kernels, state.kernels.forward_units(p), state.kernels.forward);
  };
  wide(p) ? run(double()) : run(float());
  return {total, y};
}

std::tuple<OptTensor, OptTensor, OptTensor> soft_merge_bwd(OptTensor dtotal, OptTensor dy, Tensor y, Tensor x, Tensor logits,
                                                           OptTensor weight, OptTensor mask, std::string axis,
                                                           std::string normalize, double scale, double renormalize, double eps,
                                                           int64_t iters, std::string /*gpu*/, int64_t need) {
  SoftMergeProblem p = prepare(x, logits, weight, mask, axis, normalize, scale, renormalize, eps, iters);
  OptTensor dx, dlogits, dweight;
  if (need & 1) p.dx = as_rows(*(dx = new_tensor({p.batch, p.tokens, p.width}, p.x.dtype)), kOp);
  if (need & 2) p.dlogits = as_rows(*(dlogits = new_tensor({p.batch, p.tokens, p.slots}, p.logits.dtype)), kOp);
  if (need & 4 && weight) p.dweight = as_rows(*(dweight = new_tensor({p.batch, p.tokens}, p.weight.dtype)), kOp);
  p.y = as_rows(y, kOp);
  if (dy) p.dy = as_rows(*dy, kOp);
  if (dtotal) p.dtotal = as_rows(*dtotal, kOp);
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    Run<Acc> state(p, mask);
    std::vector<Acc> upstream(size_t(p.batch * p.slots * p.width_pitch)), across(size_t(p.batch * p.width * p.pitch));
    std::vector<Acc> shift(size_t(state.of_column)), dot(size_t(state.of_column)), drows, dcolumns;
    p.upstream = upstream.data();
    p.upstream_t = across.data();
    p.shift = shift.data();
    p.dot = dot.data();
    if (p.floor > 0 || dtotal) state.over_slots(state.kernels.sums);
    state.over_slots(state.kernels.pack);
    if (p.sinkhorn && (dlogits || dweight)) state.sinkhorn_backward(drows, dcolumns);
    state.over_tokens(state.kernels.backward);
  };
  wide(p) ? run(double()) : run(float());
  return {dx, dlogits, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("soft_merge_fwd", TORCH_BOX(&soft_merge_fwd));
  m.impl("soft_merge", TORCH_BOX(&soft_merge_fwd));
  m.impl("soft_merge_bwd", TORCH_BOX(&soft_merge_bwd));
}

}  // namespace vitkern
