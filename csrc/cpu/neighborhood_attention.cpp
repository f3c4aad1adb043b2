// neighborhood_attention, neighborhood_qk and neighborhood_av on the CPU: the geometry of a call, and its tasks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
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
using Ints = std::vector<int64_t>;
constexpr int64_t kTasks = 64;             // of a call, where it has the work
constexpr int64_t kTableBytes = 256 << 10;  // of rpb laid out by lanes

template <typename Acc>
const NearKernels& chosen() {
  if constexpr (sizeof(Acc) == 8) return kernels().near_f64;
  else return kernels().near_f32;
}

// What a call of one of the three ops is given, and the arrays its problem points into.
struct Call {
  const char* op;
  NearProblem p{};
  Ints lengths;
  std::vector<int32_t> start[kNearAxes], end[kNearAxes];
  Dtype dtype, wide;
  std::vector<float> rpb32;
  std::vector<double> rpb64;

  Call(const char* name, NearPart part, const Tensor& keys, int64_t heads, const Ints& kernel, const Ints& dilation, const Ints& stride,
       const Ints& causal, bool zero)
      : op(name) {
    check(keys.dim() == 6 && kernel.size() == 3 && dilation.size() == 3 && stride.size() == 3 && causal.size() == 3, op,
          "maps must have shape [B, L0, L1, L2, H, D] and windows three axes");
    p.part = part;
    p.batch = keys.size(0);
    p.kv_heads = int32_t(keys.size(4));
    p.heads = int32_t(heads);
    check(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, op, "the heads of k must divide those of q");
    dtype = dtype_of(keys, op);
    wide = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    const int32_t lanes = kernels().lanes / (wide == Dtype::f64 ? 2 : 1);
    p.groups = p.slots = 1;
    int64_t tokens = 1;
    p.entries = 1;
    for (int a = 0; a < kNearAxes; ++a) {
      const auto s = size_t(a);
      const int64_t length = keys.size(1 + a), k = kernel[s], d = dilation[s];
      check(length >= 1 && k >= 1 && d >= 1 && k * d <= length && stride[s] >= 1 && stride[s] <= k, op,
            "kernel_size times dilation must not exceed the map, nor stride kernel_size");
      tokens *= length;
      check(tokens < (int64_t(1) << 31), op, "an image must have fewer than 2^31 tokens");
      lengths.push_back(length);
      p.length[a] = int32_t(length);
      p.kernel[a] = int32_t(k);
      p.dilation[a] = int32_t(d);
      p.slots *= int32_t(k);
      p.groups *= d;
      p.entries *= 2 * k - 1;
      for (int64_t i = 0; i < length; ++i) {
        const int64_t within = i / d, size = (length - i % d + d - 1) / d;
        const int64_t lead = std::min(within / stride[s] * stride[s] + (causal[s] ? stride[s] - 1 : stride[s] / 2), size - 1);
        const int64_t first = causal[s] ? std::max<int64_t>(lead - k + 1, 0)
                              : zero    ? lead - k / 2
                                        : std::min(std::max<int64_t>(lead - k / 2, 0), size - k);
        start[a].push_back(int32_t(first));
        end[a].push_back(int32_t(causal[s] ? std::min(first + k, within + 1) : first + k));
      }
      p.start[a] = start[a].data();
      p.end[a] = end[a].data();
    }
    choose_tile(lanes);
    choose_bands();
  }

  // Keys that tiles of `side` queries along an axis see together, over the tokens of a group.
  int64_t seen_by(int a, int32_t side, int32_t* most) const {
    int64_t sum = 0;
    *most = 0;
    for (int32_t g = 0; g < p.dilation[a]; ++g) {
      const int32_t size = (p.length[a] - g + p.dilation[a] - 1) / p.dilation[a];
      for (int32_t i = 0; i < size; i += side) {
        const int32_t stop = std::min(i + side, size);
        const int32_t count = end[a][size_t((stop - 1) * p.dilation[a] + g)] - start[a][size_t(i * p.dilation[a] + g)];
        sum += count;
        *most = std::max(*most, count);
      }
    }
    return sum;
  }
  // The sides whose product is the vector's lanes with the fewest products of queries and keys.
  void choose_tile(int32_t lanes) {
    int64_t best = std::numeric_limits<int64_t>::max();
    for (int32_t x = lanes; x >= 1; x /= 2)
      for (int32_t y = lanes / x; y >= 1; y /= 2) {
        const int32_t side[kNearAxes] = {lanes / x / y, y, x};
        int32_t most[kNearAxes];
        int64_t work = 1;
        for (int a = 0; a < kNearAxes; ++a) work *= seen_by(a, side[a], &most[a]);
        if (work >= best) continue;
        best = work;
        std::copy(side, side + kNearAxes, p.tile);
        std::copy(most, most + kNearAxes, p.most);
      }
  }
  // Few groups and heads are cut into bands along the first long axis; keys of a band and of the next but one never meet.
  void choose_bands() {
    p.band_axis = 0;
    p.bands = 1;
    for (int a = kNearAxes - 1; a >= 0; --a)
      if (p.length[a] / p.dilation[a] >= 2 * p.kernel[a] + 2 * p.tile[a]) p.band_axis = a;
    const int a = p.band_axis;
    const int32_t size = (p.length[a] + p.dilation[a] - 1) / p.dilation[a];
    p.band = size;
    if (p.batch * p.groups * p.kv_heads >= kTasks / 4) return;
    const int32_t least = std::max(2 * p.kernel[a], 4 * p.tile[a]);
    p.band = std::max(least, (size + 15) / 16);
    p.band = (p.band + p.tile[a] - 1) / p.tile[a] * p.tile[a];
    p.bands = std::max<int64_t>(1, (size + p.band - 1) / p.band);
  }
  int64_t units() const { return p.batch * p.groups * p.bands; }

  MapView view_of(const Tensor& t) const { return map_of(t, kNearAxes, 4, 0, true, op).view; }
  // A tensor [B, L0, L1, L2, H] of the type that is summed in.
  MapView flat_view(const Tensor& t) const { return map_of(t, kNearAxes, 4, 0, false, op).view; }
  Tensor new_like(int64_t heads, int64_t width, Dtype type) const { return new_map(lengths, {p.batch, heads, width}, type); }

  void queries(const Tensor& q, const Tensor& k, double scale) {
    for (int64_t a = 0; a < 4; ++a) check(q.size(a) == k.size(a), op, "q must have the batch and map of k");
    check(q.dim() == 6 && q.size(5) == k.size(5) && dtype_of(q, op) == dtype, op, "q must have the head size and dtype of k");
    p.d = int32_t(q.size(5));
    p.view[kNearQ] = view_of(q);
    p.view[kNearK] = view_of(k);
    p.scale = scale;
  }
  void values(const Tensor& v) {
    p.dv = int32_t(v.size(5));
    p.view[kNearV] = view_of(v);
  }
  void bias(const OptTensor& rpb) {
    if (!rpb) return;
    check(rpb->dim() == 4 && rpb->numel() == p.heads * p.entries && rpb->size(0) == p.heads, op, "rpb must have an entry for each offset");
    const Tensor t = torch::stable::contiguous(*rpb);
    const Dtype type = dtype_of(t, op);
    for (int64_t i = 0; i < p.heads * p.entries; ++i) {
      const double x = scalar<double>(t.const_data_ptr(), i, type);
      wide == Dtype::f64 ? rpb64.push_back(x) : rpb32.push_back(float(x));
    }
    p.rpb = wide == Dtype::f64 ? static_cast<const void*>(rpb64.data()) : rpb32.data();
    int64_t bytes = 4 * int64_t(kernels().lanes);
    for (int a = 0; a < kNearAxes; ++a) bytes *= 2 * p.kernel[a] + p.tile[a] - 2;
    p.table = bytes <= kTableBytes;
  }
  void mask(const OptTensor& mask, Tensor& kept) {
    if (!mask) return;
    check(mask->scalar_type() == torch::headeronly::ScalarType::Bool && mask->dim() == 4, op, "key_mask must be bool [B, L0, L1, L2]");
    kept = torch::stable::contiguous(*mask);
    p.mask = static_cast<const uint8_t*>(kept.const_data_ptr());
  }
  void extras(const OptTensor& k, const OptTensor& v) {
    if (!k) return;
    check(v && k->dim() == 4 && v->dim() == 4 && k->size(1) == v->size(1) && k->size(2) == p.kv_heads && v->size(2) == p.kv_heads &&
              k->size(3) == p.d && v->size(3) == p.dv,
          op, "extra keys must have shape [B|1, E, Hk, D], their values [B|1, E, Hk, Dv]");
    const auto view = [&](const Tensor& t) {
      MapView view = map_of(t, 1, 2, 0, true, op).view;
      if (t.size(0) == 1) view.batch = 0;
      return view;
    };
    p.extras = int32_t(k->size(1));
    p.k_extra = view(*k);
    p.v_extra = view(*v);
  }

  // Runs of units of one kv head; with extra keys none crosses an image.
  int64_t runs() const {
    if (units() == 0) return 0;
    const int64_t wanted = std::max<int64_t>(1, kTasks / p.kv_heads);
    if (!p.extras) return std::min(units(), wanted);
    return p.batch * std::min(p.groups * p.bands, std::max<int64_t>(1, wanted / p.batch));
  }

  template <typename Acc>
  void forward() const {
    const NearKernels& k = chosen<Acc>();
    const int64_t count = runs(), bytes = k.scratch_bytes(p, false);
    torch::stable::parallel_for(0, count * p.kv_heads, 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes);
      for (int64_t t = first; t < last; ++t) {
        const int64_t run = t / p.kv_heads;
        k.forward(p, units() * run / count, units() * (run + 1) / count, int32_t(t % p.kv_heads), scratch.data());
      }
    });
  }
  void forward() const { wide == Dtype::f64 ? forward<double>() : forward<float>(); }

  // A gradient summed over the tiles: [B, L0, L1, L2, Hk, width] of zeros in the type that is summed in.
  Tensor summed(const Tensor& like, int64_t width) const {
    return torch::stable::new_zeros(like, {p.batch, lengths[0], lengths[1], lengths[2], p.kv_heads, width}, scalar_type(wide));
  }
  Tensor rounded(const Tensor& sum, Dtype type) const {
    if (type == wide) return sum;
    Tensor t = new_tensor({p.batch, lengths[0], lengths[1], lengths[2], p.kv_heads, sum.size(5)}, type);
    return torch::stable::copy_(t, sum);
  }
  // The sum over runs of numbers [runs][n], in the dtype and shape of `like`; with `each` the runs of an image stay apart.
  template <typename Acc>
  OptTensor total(const std::vector<Acc>& parts, int64_t n, const Tensor& like, bool each) const {
    std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
    Tensor t = new_tensor(shape, dtype_of(like, op));
    const int64_t images = each ? p.batch : 1, count = runs() / std::max<int64_t>(images, 1);
    for (int64_t b = 0; b < images; ++b)
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < count; ++r) sum += double(parts[size_t((b * count + r) * n + i)]);
        set_scalar<double>(const_cast<void*>(t.const_data_ptr()), b * n + i, dtype_of(like, op), sum);
      }
    return t;
  }

  // Fills the gradients that are not null: of rpb and of the extra keys and values, in the shape of what they stand for.
  template <typename Acc>
  void backward(OptTensor* drpb, const OptTensor& rpb, OptTensor* dk, const OptTensor& k_extra, OptTensor* dv, const OptTensor& v_extra) const {
    const NearKernels& kernels = chosen<Acc>();
    const int64_t count = runs(), bytes = kernels.scratch_bytes(p, true);
    const int64_t of_bias = p.heads * p.entries, of_k = int64_t(p.extras) * p.kv_heads * p.d, of_v = int64_t(p.extras) * p.kv_heads * p.dv;
    std::vector<Acc> bias(size_t(drpb ? count * of_bias : 0)), k(size_t(dk ? count * of_k : 0)), v(size_t(dv ? count * of_v : 0));
    for (int32_t colour = 0; colour < (p.bands > 1 ? 2 : 1); ++colour)
      torch::stable::parallel_for(0, count * p.kv_heads, 1, [&](int64_t first, int64_t last) {
        Scratch scratch(bytes);
        for (int64_t t = first; t < last; ++t) {
          const int64_t run = t / p.kv_heads;
          const NearSums sums{drpb ? bias.data() + run * of_bias : nullptr, dk ? k.data() + run * of_k : nullptr,
                              dv ? v.data() + run * of_v : nullptr};
          kernels.backward(p, units() * run / count, units() * (run + 1) / count, colour, int32_t(t % p.kv_heads), sums, scratch.data());
        }
      });
    if (drpb) *drpb = total<Acc>(bias, of_bias, *rpb, false);
    if (dk) *dk = total<Acc>(k, of_k, *k_extra, k_extra->size(0) == p.batch);
    if (dv) *dv = total<Acc>(v, of_v, *v_extra, v_extra->size(0) == p.batch);
  }
};

std::tuple<Tensor, Tensor> neighborhood_attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor rpb, OptTensor key_mask, OptTensor k_extra,
                                                      OptTensor v_extra, Ints kernel, Ints dilation, Ints stride, Ints causal, bool zero,
                                                      double scale, std::string /*gpu*/) {
  Call call("neighborhood_attention", NearPart::fused, k, q.size(4), kernel, dilation, stride, causal, zero);
  NearProblem& p = call.p;
  Tensor mask;
  call.queries(q, k, scale);
  call.values(v);
  call.bias(rpb);
  call.mask(key_mask, mask);
  call.extras(k_extra, v_extra);
  Tensor out = call.new_like(p.heads, p.dv, call.dtype), lse = new_map(call.lengths, {p.batch, p.heads}, call.wide);
  p.view[kNearOut] = call.view_of(out);
  p.view[kNearLse] = call.flat_view(lse);
  call.forward();
  return {out, lse};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> neighborhood_attention_bwd(
    OptTensor dout, OptTensor dlse, Tensor lse, Tensor q, Tensor k, Tensor v, OptTensor rpb, OptTensor key_mask, OptTensor k_extra,
    OptTensor v_extra, Ints kernel, Ints dilation, Ints stride, Ints causal, bool zero, double scale, std::string /*gpu*/, int64_t need) {
  Call call("neighborhood_attention", NearPart::fused, k, q.size(4), kernel, dilation, stride, causal, zero);
  NearProblem& p = call.p;
  Tensor mask;
  call.queries(q, k, scale);
  call.values(v);
  call.bias(rpb);
  call.mask(key_mask, mask);
  call.extras(k_extra, v_extra);
  if (!dout) dout = torch::stable::new_zeros(v, {p.batch, call.lengths[0], call.lengths[1], call.lengths[2], p.heads, p.dv});
  p.view[kNearDout] = call.view_of(*dout);
  p.view[kNearLse] = call.flat_view(lse);
  if (dlse) p.view[kNearDlse] = call.flat_view(*dlse);
  OptTensor dq, dk, dv, drpb, dk_extra, dv_extra;
  const bool extra_k = need & 16 && k_extra, extra_v = need & 32 && v_extra;
  if (need & 1) p.view[kNearDq] = call.view_of(*(dq = call.new_like(p.heads, p.d, call.dtype)));
  if (need & 2 || extra_k) dk = call.summed(k, p.d), p.dk = const_cast<void*>(dk->const_data_ptr());
  if (need & 4 || extra_v) dv = call.summed(v, p.dv), p.dv_sum = const_cast<void*>(dv->const_data_ptr());
  const auto run = [&](auto acc) {
    call.backward<decltype(acc)>(need & 8 && rpb ? &drpb : nullptr, rpb, extra_k ? &dk_extra : nullptr, k_extra,
                                 extra_v ? &dv_extra : nullptr, v_extra);
  };
  call.wide == Dtype::f64 ? run(double()) : run(float());
  if (need & 2) dk = call.rounded(*dk, call.dtype);
  else dk.reset();
  if (need & 4) dv = call.rounded(*dv, call.dtype);
  else dv.reset();
  return {dq, dk, dv, drpb, dk_extra, dv_extra};
}

Tensor neighborhood_qk_fwd(Tensor q, Tensor k, OptTensor rpb, Ints kernel, Ints dilation, Ints stride, Ints causal, bool zero, double scale,
                           std::string /*gpu*/) {
  Call call("neighborhood_qk", NearPart::qk, k, q.size(4), kernel, dilation, stride, causal, zero);
  call.queries(q, k, scale);
  call.bias(rpb);
  Tensor scores = call.new_like(call.p.heads, call.p.slots, call.dtype);
  call.p.view[kNearA] = call.view_of(scores);
  call.forward();
  return scores;
}

std::tuple<OptTensor, OptTensor, OptTensor> neighborhood_qk_bwd(OptTensor dscores, Tensor q, Tensor k, OptTensor rpb, Ints kernel,
                                                                Ints dilation, Ints stride, Ints causal, bool zero, double scale,
                                                                std::string /*gpu*/, int64_t need) {
  Call call("neighborhood_qk", NearPart::qk, k, q.size(4), kernel, dilation, stride, causal, zero);
  NearProblem& p = call.p;
  call.queries(q, k, scale);
  call.bias(rpb);
  p.view[kNearDa] = call.view_of(*dscores);
  OptTensor dq, dk, drpb;
  if (need & 1) p.view[kNearDq] = call.view_of(*(dq = call.new_like(p.heads, p.d, call.dtype)));
  if (need & 2) dk = call.summed(k, p.d), p.dk = const_cast<void*>(dk->const_data_ptr());
  OptTensor* bias = need & 4 && rpb ? &drpb : nullptr;
  if (call.wide == Dtype::f64) call.backward<double>(bias, rpb, nullptr, {}, nullptr, {});
  else call.backward<float>(bias, rpb, nullptr, {}, nullptr, {});
  if (dk) dk = call.rounded(*dk, call.dtype);
  return {dq, dk, drpb};
}

Tensor neighborhood_av_fwd(Tensor a, Tensor v, Ints kernel, Ints dilation, Ints stride, Ints causal, bool zero, std::string /*gpu*/) {
  Call call("neighborhood_av", NearPart::av, v, a.size(4), kernel, dilation, stride, causal, zero);
  check(a.dim() == 6 && a.size(5) == call.p.slots, call.op, "attention must have a weight for each slot");
  call.values(v);
  call.p.view[kNearA] = call.view_of(a);
  Tensor out = call.new_like(call.p.heads, call.p.dv, call.dtype);
  call.p.view[kNearOut] = call.view_of(out);
  call.forward();
  return out;
}

std::tuple<OptTensor, OptTensor> neighborhood_av_bwd(OptTensor dout, Tensor a, Tensor v, Ints kernel, Ints dilation, Ints stride, Ints causal,
                                                     bool zero, std::string /*gpu*/, int64_t need) {
  Call call("neighborhood_av", NearPart::av, v, a.size(4), kernel, dilation, stride, causal, zero);
  NearProblem& p = call.p;
  call.values(v);
  p.view[kNearA] = call.view_of(a);
  p.view[kNearDout] = call.view_of(*dout);
  OptTensor da, dv;
  if (need & 1) p.view[kNearDa] = call.view_of(*(da = call.new_like(p.heads, p.slots, dtype_of(a, call.op))));
  if (need & 2) dv = call.summed(v, p.dv), p.dv_sum = const_cast<void*>(dv->const_data_ptr());
  if (call.wide == Dtype::f64) call.backward<double>(nullptr, {}, nullptr, {}, nullptr, {});
  else call.backward<float>(nullptr, {}, nullptr, {}, nullptr, {});
  if (dv) dv = call.rounded(*dv, call.dtype);
  return {da, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("neighborhood_attention_fwd", TORCH_BOX(&neighborhood_attention_fwd));
  m.impl("neighborhood_attention", TORCH_BOX(&neighborhood_attention_fwd));
  m.impl("neighborhood_attention_bwd", TORCH_BOX(&neighborhood_attention_bwd));
  m.impl("neighborhood_qk_fwd", TORCH_BOX(&neighborhood_qk_fwd));
  m.impl("neighborhood_qk", TORCH_BOX(&neighborhood_qk_fwd));
  m.impl("neighborhood_qk_bwd", TORCH_BOX(&neighborhood_qk_bwd));
  m.impl("neighborhood_av_fwd", TORCH_BOX(&neighborhood_av_fwd));
  m.impl("neighborhood_av", TORCH_BOX(&neighborhood_av_fwd));
  m.impl("neighborhood_av_bwd", TORCH_BOX(&neighborhood_av_bwd));
}

}  // namespace vitkern
