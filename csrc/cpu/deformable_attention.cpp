// deformable_attention on the CPU: blocks of queries and heads to threads; in the backward, levels of heads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "deformable_attention";

char* data_of(const Tensor& t) { return static_cast<char*>(const_cast<void*>(t.const_data_ptr())); }
DeformRows rows_of(const Tensor& t) {
  const auto s = t.strides();
  return {data_of(t), dtype_of(t, kOp), s[0], s[1], s[2], s[3]};
}
// [B, N, H, G, Q, 2] or [B, N, H, G, Q].
DeformPlaces places_of(const Tensor& t) {
  const auto s = t.strides();
  return {data_of(t), dtype_of(t, kOp), s[0], s[1], s[2], s[4], t.dim() == 6 ? s[5] : 0};
}

struct Run {
  DeformProblem p{};
  std::vector<DeformLevel> levels;

  Run(const Tensor& value, const Tensor& locations, const Tensor& weights, const std::vector<int64_t>& shapes,
      const std::vector<int64_t>& points, bool nearest, bool normalize) {
    check(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5, kOp,
          "value must be [B, S, H, D], locations [B, N, H, G, Q, 2] and weights [B, N, H, G, Q]");
    check(locations.size(0) == value.size(0) && locations.size(2) == value.size(2) && locations.size(5) == 2, kOp,
          "locations must have the batch and heads of value, and x and y");
    for (int64_t a = 0; a < 5; ++a) check(weights.size(a) == locations.size(a), kOp, "weights must have the points of locations");
    p.batch = value.size(0);
    p.queries = locations.size(1);
    p.heads = int32_t(value.size(2));
    p.dim = int32_t(value.size(3));
    p.nearest = nearest;
    p.normalize = normalize;
    p.value = rows_of(value);
    p.locations = places_of(locations);
    p.weights = places_of(weights);
    const int64_t groups = locations.size(3), inner = locations.size(4);
    check(shapes.size() == 2 * points.size() && (groups == 1 || groups == int64_t(points.size())), kOp,
          "shapes must hold height and width of each level, and points their number");
    int64_t cells = 0, before = 0;
    for (size_t l = 0; l < points.size(); ++l) {
      const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
      check(height >= 1 && width >= 1 && points[l] >= 0 && height < (1 << 24) && width < (1 << 24) && height * width < (int64_t(1) << 31) &&
                points[l] < (1 << 20),
            kOp, "a level must have cells, fewer than 2^31");
      check(groups == 1 || points[l] == inner, kOp, "the levels must have the points of locations");
      const bool apart = groups > 1;
      levels.push_back({int32_t(height), int32_t(width), int32_t(before), int32_t(points[l]), cells,
                        apart ? int64_t(l) * locations.stride(3) : before * p.locations.point,
                        apart ? int64_t(l) * weights.stride(3) : before * p.weights.point});
      cells += height * width;
      before += points[l];
    }
    check(cells == value.size(1) && before == groups * inner && before < (1 << 20), kOp, "the levels must have the cells of value and the points");
    p.level = levels.data();
    p.levels = int32_t(levels.size());
    p.points = int32_t(before);
  }

  const DeformKernels& chosen() const { return p.value.dtype == Dtype::f64 ? kernels().deform_f64 : kernels().deform_f32; }

  template <typename Kernel>
  void over_blocks(Kernel kernel, int64_t bytes) const {
    const int64_t blocks = (p.queries * p.heads + kDeformRows - 1) / kDeformRows;
    torch::stable::parallel_for(0, p.batch * blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes, false);
      for (int64_t t = begin; t < end; ++t) kernel(p, t / blocks, t % blocks * kDeformRows, scratch.data());
    });
  }
};

Tensor deformable_attention(Tensor value, Tensor locations, Tensor weights, std::vector<int64_t> shapes, std::vector<int64_t> points,
                            bool nearest, bool normalize, std::string /*gpu*/) {
  Run r(value, locations, weights, shapes, points, nearest, normalize);
  Tensor out = new_tensor({r.p.batch, r.p.queries, r.p.heads, r.p.dim}, r.p.value.dtype);
  DeformProblem& p = r.p;
  p.out = rows_of(out);
  const DeformKernels& k = r.chosen();
  if (p.value.dim == 1 && p.queries * p.points >= kDeformReads * value.size(1)) {
    const int64_t most = (p.queries * p.points) / (kDeformReads * value.size(1));
    p.chunk = std::max<int64_t>(kDeformRows, (p.queries + most - 1) / most);
    const int64_t chunks = (p.queries + p.chunk - 1) / p.chunk, bytes = k.forward_bytes(p);
    torch::stable::parallel_for(0, p.batch * p.heads * chunks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes, false);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t slice = t / chunks;
        k.forward_head(p, slice / p.heads, int32_t(slice % p.heads), t % chunks * p.chunk, scratch.data());
      }
    });
  } else {
    r.over_blocks(k.forward, k.forward_bytes(p));
  }
  return out;
}

std::tuple<OptTensor, OptTensor, OptTensor> deformable_attention_bwd(OptTensor dout, Tensor value, Tensor locations, Tensor weights,
                                                                     std::vector<int64_t> shapes, std::vector<int64_t> points,
                                                                     bool nearest, bool normalize, std::string /*gpu*/, int64_t need) {
  check(dout.has_value(), kOp, "the gradient of out must be given");
  Run r(value, locations, weights, shapes, points, nearest, normalize);
  DeformProblem& p = r.p;
  p.dout = rows_of(*dout);
  OptTensor dvalue, dlocations, dweights;
  const auto sizes = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
  if (need & 1) p.dvalue = rows_of(*(dvalue = new_tensor(sizes(value), p.value.dtype)));
  if (need & 2) p.dlocations = places_of(*(dlocations = new_tensor(sizes(locations), p.locations.dtype)));
  if (need & 4) p.dweights = places_of(*(dweights = new_tensor(sizes(weights), p.weights.dtype)));
  if (!(need & 7)) return {dvalue, dlocations, dweights};
  const DeformKernels& k = r.chosen();
  const bool wide = p.value.dtype == Dtype::f64, soft = normalize && (need & 4);
  const int64_t tasks = p.batch * p.heads * p.levels, bytes = k.backward_bytes(p);
  const Scratch raw(soft ? p.batch * p.queries * p.heads * p.points * (wide ? 8 : 4) : 64, false);
  if (soft) p.dsoft = raw.data();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes, false);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slice = t / p.levels;
      k.backward(p, slice / p.heads, int32_t(slice % p.heads), int32_t(t % p.levels), scratch.data());
    }
  });
  if (soft) r.over_blocks(k.softmax, bytes);
  return {dvalue, dlocations, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("deformable_attention_fwd", TORCH_BOX(&deformable_attention));
  m.impl("deformable_attention", TORCH_BOX(&deformable_attention));
  m.impl("deformable_attention_bwd", TORCH_BOX(&deformable_attention_bwd));
}

}  // namespace vitkern
