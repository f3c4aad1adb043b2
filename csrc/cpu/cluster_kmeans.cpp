// cluster_kmeans on the CPU: turns, and rows of cells to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "plans.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "cluster_kmeans";

KmeansProblem prepare(const Tensor& x, const Tensor& start, const OptTensor& mask, const std::vector<int64_t>& grid,
                      int64_t window, double temperature, const KmeansKernels& kernels) {
  KmeansProblem p{};
  check(x.dim() == 3 && start.dim() == 3 && grid.size() == 4, kOp, "x and start must have shape [B, N, C] and [B, k, C]");
  check(*std::min_element(grid.begin(), grid.end()) >= 1 && window >= 1, kOp, "grid and window must be at least 1");
  check(grid[0] * grid[1] == x.size(1) && grid[2] * grid[3] == start.size(1) && x.size(1) < (int64_t(1) << 30) &&
            start.size(1) < (int64_t(1) << 30),
        kOp, "grid must hold the tokens of x and the centres of start");
  check(start.size(0) == x.size(0) && start.size(2) == x.size(2), kOp, "start must have the batch and channels of x");
  p.x = as_rows(x, kOp);
  if (mask) {
    check(mask->dim() == 2 && mask->size(0) == x.size(0) && mask->size(1) == x.size(1) &&
              mask->scalar_type() == torch::headeronly::ScalarType::Bool,
          kOp, "mask must be bool [B, N]");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
    p.mask_batch = mask->stride(0);
    p.mask_token = mask->stride(1);
  }
  p.width = int32_t(x.size(2));
  p.pitch = (p.width + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  p.high = int32_t(grid[0]);
  p.wide = int32_t(grid[1]);
  p.rows = int32_t(grid[2]);
  p.columns = int32_t(grid[3]);
  p.reach = int32_t(std::min(window / 2, grid[2] - 1));
  p.column_reach = int32_t(std::min(window / 2, grid[3] - 1));
  p.temperature = temperature;
  return p;
}

// A tensor [B, k, C] as dense rows of p.pitch, each divided by its divisor where there are some; the padding is 0.
template <typename Acc>
std::vector<Acc> dense(const KmeansProblem& p, const Tensor& t, const Acc* divisor) {
  const int64_t count = t.size(0) * t.size(1);
  std::vector<Acc> rows(size_t(count * p.pitch));
  const RowsView v = as_rows(t, kOp);
  const int64_t each = t.size(1);
  with_element(v.dtype, [&](auto element) {
    const auto* data = reinterpret_cast<const decltype(element)*>(v.data);
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / p.pitch), [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m) {
        const auto* from = data + m / each * v.batch + m % each * v.token;
        const Acc by = divisor ? divisor[m] : Acc(1);
        for (int32_t c = 0; c < p.width; ++c) rows[size_t(m * p.pitch + c)] = widened<Acc>(from[c * v.dim]) / by;
      }
    });
  });
  return rows;
}

template <typename Acc>
void undense(const KmeansProblem& p, const std::vector<Acc>& rows, Tensor& t) {
  const int64_t count = t.size(0) * t.size(1);
  with_element(dtype_of(t, kOp), [&](auto element) {
    using T = decltype(element);
    T* data = static_cast<T*>(t.mutable_data_ptr());
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / p.pitch), [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m)
        for (int32_t c = 0; c < p.width; ++c) data[m * p.width + c] = narrowed<T>(rows[size_t(m * p.pitch + c)]);
    });
  });
}

template <typename Kernel>
void over_rows_of_cells(const KmeansProblem& p, int64_t batch, int64_t bytes, Kernel kernel) {
  torch::stable::parallel_for(0, batch * p.rows, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t t = first; t < last; ++t) kernel(p, t / p.rows, int32_t(t % p.rows), scratch.data());
  });
}

template <typename Acc>
void turns(KmeansProblem& p, const KmeansKernels& kernels, int64_t batch, const Tensor& start, int64_t iters, Tensor& centers,
           Tensor& previous, Tensor& total) {
  const int64_t k = int64_t(p.rows) * p.columns, held = batch * p.rows * (2 * p.reach + 1) * p.columns;
  std::vector<Acc> seen = dense<Acc>(p, start, nullptr), next = seen;
  std::vector<Acc> sums(size_t(held * p.pitch)), weights(static_cast<size_t>(held));
  p.sums = sums.data();
  p.weights = weights.data();
  p.total = total.mutable_data_ptr();
  std::fill_n(static_cast<Acc*>(p.total), batch * k, Acc(1));
  const int64_t bytes = kernels.scratch_bytes(p);
  for (int64_t turn = 0; turn < iters; ++turn) {
    seen.swap(next);
    p.centers = seen.data();
    p.next = next.data();
    over_rows_of_cells(p, batch, bytes, kernels.gather);
    torch::stable::parallel_for(0, batch * k, std::max<int64_t>(1, 4096 / p.pitch), [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m) kernels.combine(p, m / k, int32_t(m % k));
    });
  }
  undense(p, next, centers);
  undense(p, seen, previous);
}

std::tuple<Tensor, Tensor, Tensor> cluster_kmeans(Tensor x, Tensor start, OptTensor mask, std::vector<int64_t> grid,
                                                  int64_t window, double temperature, int64_t iters, std::string /*gpu*/) {
  const bool wide = dtype_of(x, kOp) == Dtype::f64;
  const KmeansKernels& kernels = wide ? vitkern::kernels().kmeans_f64 : vitkern::kernels().kmeans_f32;
  KmeansProblem p = prepare(x, start, mask, grid, window, temperature, kernels);
  const int64_t batch = x.size(0), k = start.size(1);
  const Dtype acc = wide ? Dtype::f64 : Dtype::f32;
  Tensor centers = new_tensor({batch, k, p.width}, p.x.dtype), previous = new_tensor({batch, k, p.width}, acc);
  Tensor total = new_tensor({batch, k}, acc);
  if (wide) turns<double>(p, kernels, batch, start, iters, centers, previous, total);
  else turns<float>(p, kernels, batch, start, iters, centers, previous, total);
  return {centers, previous, total};
}

template <typename Acc>
void gradient(KmeansProblem& p, const KmeansKernels& kernels, const Tensor& dcenters, const Tensor& previous,
              const Tensor& total, int64_t batch) {
  const std::vector<Acc> seen = dense<Acc>(p, previous, nullptr);
  const std::vector<Acc> gradients = dense<Acc>(p, dcenters, static_cast<const Acc*>(total.const_data_ptr()));
  p.centers = seen.data();
  p.gradients = gradients.data();
  over_rows_of_cells(p, batch, kernels.scratch_bytes(p), kernels.backward);
}

OptTensor cluster_kmeans_bwd(OptTensor dcenters, OptTensor /*dprevious*/, OptTensor /*dtotal*/, Tensor previous, Tensor total,
                             Tensor x, Tensor start, OptTensor mask, std::vector<int64_t> grid, int64_t window,
                             double temperature, int64_t iters, std::string /*gpu*/, int64_t need) {
  if (!(need & 1)) return std::nullopt;
  const bool wide = dtype_of(x, kOp) == Dtype::f64;
  const KmeansKernels& kernels = wide ? vitkern::kernels().kmeans_f64 : vitkern::kernels().kmeans_f32;
  KmeansProblem p = prepare(x, start, mask, grid, window, temperature, kernels);
  check(total.is_contiguous() && dtype_of(total, kOp) == (wide ? Dtype::f64 : Dtype::f32), kOp, "total must be as the forward made it");
  Tensor dx = new_tensor({x.size(0), x.size(1), p.width}, p.x.dtype);
  p.dx = as_rows(dx, kOp);
  for (const Tensor* t : {&start, &previous, dcenters ? &*dcenters : &previous})
    check(t->dim() == 3 && t->size(0) == start.size(0) && t->size(1) == start.size(1) && t->size(2) == p.width &&
              total.numel() == t->size(0) * t->size(1),
          kOp, "previous, total and the gradient must have the shape of the centres");
  if (!dcenters || iters == 0) {
    std::memset(dx.mutable_data_ptr(), 0, size_t(x.size(0) * x.size(1) * p.width * size_of(p.x.dtype)));
    return dx;
  }
  if (wide) gradient<double>(p, kernels, *dcenters, previous, total, x.size(0));
  else gradient<float>(p, kernels, *dcenters, previous, total, x.size(0));
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("cluster_kmeans_fwd", TORCH_BOX(&cluster_kmeans));
  m.impl("cluster_kmeans", TORCH_BOX(&cluster_kmeans));
  m.impl("cluster_kmeans_bwd", TORCH_BOX(&cluster_kmeans_bwd));
}

}  // namespace vitkern
