// feature_rows on the CPU: tokens side by side.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "fields.h"
#include "kernels.h"
#include "linear_attention_maps.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "feature_rows";
constexpr int64_t kTokens = 32;  // of one piece of work

struct Call {
  FeatureRowsProblem p{};
  const FeatureRowsKernels* kernels;
  int64_t batch;
  Dtype acc;

  Call(const Tensor& x, const OptTensor& mask, const OptTensor& weight, const std::string& feature_map, double rate, double scale) {
    p.x = field_of(x, false, true, kOp);
    acc = wider(p.x.dtype, p.x.dtype);
    kernels = acc == Dtype::f64 ? &vitkern::kernels().rows_f64 : &vitkern::kernels().rows_f32;
    batch = x.size(0);
    p.heads = int32_t(x.size(2));
    const auto at = std::find(kFeatures.begin(), kFeatures.end(), feature_map);
    check(at - kFeatures.begin() < int64_t(Feature::sign), kOp, "feature_map must be one without parameters");
    p.map.feature = Feature(at - kFeatures.begin());
    p.map.rate = rate;
    p.map.q_tokens = int32_t(x.size(1));
    p.map.depth = int32_t(x.size(3));
    p.map.depth_pad = kernels->padded(p.map.depth);
    check(p.map.depth >= 1 && p.heads >= 1, kOp, "x must have heads and channels");
    p.scale = scale;
    if (mask) {
      check(mask->scalar_type() == torch::headeronly::ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch &&
                mask->size(1) == x.size(1),
            kOp, "mask must be bool [B, N]");
      p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
      p.mask_batch = mask->stride(0), p.mask_token = mask->stride(1);
    }
    if (weight) {
      const int64_t own = weight->dim() == 3 ? weight->size(2) : 0;
      check(weight->dim() == 3 && weight->size(0) == batch && weight->size(1) == x.size(1) && (own == 1 || own == p.heads), kOp,
            "weight must be [B, N, H] or [B, N, 1]");
      p.weight = field_of(*weight, false, false, kOp);
      if (own == 1) p.weight.head = 0;
    }
  }

  template <typename Work>
  void run(Work work) const {
    const int64_t tokens = p.map.q_tokens, parts = (tokens + kTokens - 1) / kTokens, bytes = kernels->scratch_bytes(p);
    torch::stable::parallel_for(0, batch * parts, 4, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t % parts * kTokens;
        work(p, t / parts, int32_t(first), int32_t(std::min(first + kTokens, tokens)), scratch.data());
      }
    });
  }
};

Tensor feature_rows_fwd(Tensor x, OptTensor mask, OptTensor weight, std::string feature_map, double rate, double scale, std::string /*gpu*/) {
  Call call(x, mask, weight, feature_map, rate, scale);
  Tensor out = new_tensor({call.batch, x.size(1), x.size(2), x.size(3)}, call.acc);
  call.p.out = out.mutable_data_ptr();
  call.run(call.kernels->forward);
  return out;
}

std::tuple<OptTensor, OptTensor> feature_rows_bwd(OptTensor dout, Tensor x, OptTensor mask, OptTensor weight, std::string feature_map, double rate,
                                                  double scale, std::string /*gpu*/, int64_t need) {
  Call call(x, mask, weight, feature_map, rate, scale);
  FeatureRowsProblem& p = call.p;
  check(bool(dout) && dout->dim() == 4, kOp, "the output needs a gradient [B, N, H, D]");
  p.dout = field_of(*dout, false, true, kOp);
  for (int64_t axis = 0; axis < 4; ++axis) check(dout->size(axis) == x.size(axis), kOp, "the gradient of the output must have its shape");
  OptTensor dx, dweight;
  if (need & 1) {
    dx = new_tensor({call.batch, x.size(1), x.size(2), x.size(3)}, p.x.dtype);
    p.dx = field_of(*dx, false, true, kOp);
  }
  if (need & 2 && weight) {
    dweight = new_tensor({call.batch, x.size(1), weight->size(2)}, p.weight.dtype);
    p.dweight = field_of(*dweight, false, false, kOp);
    if (weight->size(2) == 1) p.dweight.head = 0;
  }
  call.run(call.kernels->backward);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("feature_rows_fwd", TORCH_BOX(&feature_rows_fwd));
  m.impl("feature_rows", TORCH_BOX(&feature_rows_fwd));
  m.impl("feature_rows_bwd", TORCH_BOX(&feature_rows_bwd));
}

}  // namespace vitkern
