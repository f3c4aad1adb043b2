// reconstruct_tokens on the CPU: blocks of rows to threads; in the backward, chunks of rows with sums of their own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "distance_groups.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "reconstruct_tokens";
constexpr int64_t kMostChunks = 16;

ReconstructProblem prepare(const Tensor& y, const Tensor& x, const Tensor& centers, int64_t k, double temperature, bool l2) {
  check(y.dim() == 3 && x.dim() == 3 && centers.dim() == 3, kOp, "y, x and centers must have three axes");
  const int64_t batch = x.size(0);
  check(y.size(0) == batch && centers.size(0) == batch && centers.size(1) == y.size(1) && centers.size(2) == x.size(2), kOp,
        "y must have shape [B, M, C], x [B, N, E] and centers [B, M, E]");
  check(k >= 1 && y.size(1) >= 1 && x.size(1) < (int64_t(1) << 30) && y.size(1) < (int64_t(1) << 30), kOp,
        "k and the clusters must be at least 1");
  check((dtype_of(x, kOp) == Dtype::f64) == (dtype_of(y, kOp) == Dtype::f64), kOp, "x and y must both be float64, or neither");
  ReconstructProblem p{};
  p.distances.x = as_rows(x, kOp);
  p.distances.y = as_rows(centers, kOp);
  p.distances.width = int32_t(x.size(2));
  p.y = as_rows(y, kOp);
  p.clusters = int32_t(y.size(1));
  p.width = int32_t(y.size(2));
  p.keep = int32_t(std::min<int64_t>(k, p.clusters));
  p.temperature = temperature;
  p.l2 = l2;
  return p;
}

// One list 0, 1, ... for every sample.
std::vector<std::vector<int32_t>> counted(int64_t batch, int64_t n) {
  std::vector<int32_t> list(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) list[size_t(i)] = int32_t(i);
  return std::vector<std::vector<int32_t>>(size_t(batch), list);
}

const ReconstructKernels& kernels_for(const ReconstructProblem& p) {
  return p.y.dtype == Dtype::f64 ? kernels().reconstruct_f64 : kernels().reconstruct_f32;
}

Tensor reconstruct_tokens(Tensor y, Tensor x, Tensor centers, int64_t k, double temperature, bool l2, std::string /*gpu*/) {
  ReconstructProblem p = prepare(y, x, centers, k, temperature, l2);
  Tensor out = new_tensor({x.size(0), x.size(1), p.width}, p.y.dtype);
  if (x.size(0) == 0) return out;
  p.out = as_rows(out, kOp);
  const ReconstructKernels& kernels = kernels_for(p);
  const auto rows = counted(x.size(0), x.size(1)), columns = counted(x.size(0), p.clusters);
  const DistanceGroups groups(p.distances, 1, rows, columns, kernels.panel, p.y.dtype == Dtype::f64 ? 8 : 4);
  const int64_t bytes = kernels.scratch_bytes(p, kRowBlock);
  groups.pack(kernels.pack, bytes);
  groups.over_rows([&](const DistanceGroup& g, int32_t first, int32_t last, void* scratch) { kernels.forward(p, g, first, last, scratch); },
                   bytes);
  return out;
}

// Adds the sums of a sample's chunks in their order: dy, and dc = 2 (c sum dd - sum dd x).
template <typename Acc>
class Chunks {
 public:
  Chunks(const ReconstructProblem& p, int64_t batch, int64_t tokens)
      : p_(p), batch_(batch), tokens_(tokens), each_(std::clamp<int64_t>(tokens / (2 * p.clusters), 1, kMostChunks)) {
    const size_t count = size_t(batch * each_ * p.clusters);
    if (p.needs_y) dy_.resize(count * size_t(p.width));
    if (p.needs_centers) {
      moved_.resize(count * size_t(p.distances.width));
      pulled_.resize(count);
    }
  }

  void run(const DistanceGroups& groups, const ReconstructKernels& kernels) {
    const int64_t bytes = kernels.scratch_bytes(p_, kRowBlock);
    torch::stable::parallel_for(0, batch_ * each_, 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes, false);
      for (int64_t t = first; t < last; ++t) {
        const DistanceGroup& g = groups.group(t / each_);
        const int64_t at = t % each_, end = tokens_ * (at + 1) / each_;
        for (int64_t r = tokens_ * at / each_; r < end; r += kRowBlock)
          kernels.backward(p_, g, int32_t(r), int32_t(std::min(end, r + kRowBlock)), part(dy_, t, p_.width),
                           part(moved_, t, p_.distances.width), part(pulled_, t, 1), scratch.data());
      }
    });
  }

  void store_y(Tensor& dy) {
    store(dy, p_.width, [&](int64_t b, int64_t m, int32_t c) { return total(dy_, b, m, c, p_.width); });
  }
  void store_centers(Tensor& dcenters) {
    const RowsView& v = p_.distances.y;
    store(dcenters, p_.distances.width, [&](int64_t b, int64_t m, int32_t c) {
      const Acc center = scalar<Acc>(v.data, b * v.batch + m * v.token + c * v.dim, v.dtype);
      return 2 * (center * total(pulled_, b, m, 0, 1) - total(moved_, b, m, c, p_.distances.width));
    });
  }

 private:
  Acc* part(std::vector<Acc>& sums, int64_t task, int64_t width) {
    return sums.empty() ? nullptr : &sums[size_t(task * p_.clusters * width)];
  }
  Acc total(const std::vector<Acc>& sums, int64_t b, int64_t m, int32_t c, int64_t width) const {
    Acc sum = 0;
    for (int64_t i = 0; i < each_; ++i) sum += sums[size_t(((b * each_ + i) * p_.clusters + m) * width + c)];
    return sum;
  }
  template <typename Value>
  void store(Tensor& t, int32_t width, Value value) {
    const Dtype dtype = dtype_of(t, kOp);
    void* data = t.mutable_data_ptr();
    torch::stable::parallel_for(0, batch_ * p_.clusters, std::max<int64_t>(1, 4096 / std::max(width, 1)), [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m)
        for (int32_t c = 0; c < width; ++c) set_scalar<Acc>(data, m * width + c, dtype, value(m / p_.clusters, m % p_.clusters, c));
    });
  }

  const ReconstructProblem& p_;
  int64_t batch_, tokens_, each_;
  std::vector<Acc> dy_, moved_, pulled_;
};

template <typename Acc>
void gradients(const ReconstructProblem& p, const DistanceGroups& groups, const ReconstructKernels& kernels, int64_t batch,
               int64_t tokens, OptTensor& dy, OptTensor& dcenters) {
  Chunks<Acc> chunks(p, batch, tokens);
  chunks.run(groups, kernels);
  if (dy) chunks.store_y(*dy);
  if (dcenters) chunks.store_centers(*dcenters);
}

std::tuple<OptTensor, OptTensor, OptTensor> reconstruct_tokens_bwd(OptTensor dout, Tensor y, Tensor x, Tensor centers, int64_t k,
                                                                   double temperature, bool l2, std::string /*gpu*/,
                                                                   int64_t need) {
  check(dout.has_value(), kOp, "the gradient of out must be given");
  ReconstructProblem p = prepare(y, x, centers, k, temperature, l2);
  const int64_t batch = x.size(0), tokens = x.size(1);
  OptTensor dy, dx, dcenters;
  p.needs_y = need & 1;
  p.needs_x = need & 2;
  p.needs_centers = need & 4;
  if (p.needs_y) dy = new_tensor({batch, p.clusters, p.width}, p.y.dtype);
  if (p.needs_x) p.dx = as_rows(*(dx = new_tensor({batch, tokens, p.distances.width}, p.distances.x.dtype)), kOp);
  if (p.needs_centers) dcenters = new_tensor({batch, p.clusters, p.distances.width}, p.distances.y.dtype);
  p.dout = as_rows(*dout, kOp);
  if (batch == 0) return {dy, dx, dcenters};
  const ReconstructKernels& kernels = kernels_for(p);
  const bool wide = p.y.dtype == Dtype::f64;
  const auto rows = counted(batch, tokens), columns = counted(batch, p.clusters);
  const DistanceGroups groups(p.distances, 1, rows, columns, kernels.panel, wide ? 8 : 4);
  groups.pack(kernels.pack, kernels.scratch_bytes(p, kRowBlock));
  if (wide) gradients<double>(p, groups, kernels, batch, tokens, dy, dcenters);
  else gradients<float>(p, groups, kernels, batch, tokens, dy, dcenters);
  return {dy, dx, dcenters};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("reconstruct_tokens_fwd", TORCH_BOX(&reconstruct_tokens));
  m.impl("reconstruct_tokens", TORCH_BOX(&reconstruct_tokens));
  m.impl("reconstruct_tokens_bwd", TORCH_BOX(&reconstruct_tokens_bwd));
}

}  // namespace vitkern
