// channel_attention on the CPU: sums over the chunks of every window, the weights of every head, the rows of every chunk.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
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
constexpr const char* kOp = "channel_attention";

ChannelView view_of(const Tensor& t) {
  const auto s = t.strides();
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), s[0], s[1], s[2], s[3], s[4]};
}
// An empty tensor of t's shape with tokens side by side where they are so in t, else contiguous.
Tensor empty_as(const Tensor& t) {
  const auto n = t.sizes();
  const Dtype dtype = dtype_of(t, kOp);
  if (t.stride(2) != 1 || t.stride(4) == 1) return new_tensor({n[0], n[1], n[2], n[3], n[4]}, dtype);
  const Tensor made = new_tensor({n[0], n[3], n[4], n[1], n[2]}, dtype);  // [B, H, D, Y, X]
  return torch::stable::transpose(torch::stable::transpose(made, 1, 3), 2, 4);
}

template <typename Acc>
std::vector<Acc> numbers(const OptTensor& t) {
  std::vector<Acc> read;
  for (int64_t i = 0; t && i < t->numel(); ++i) read.push_back(scalar<Acc>(t->const_data_ptr(), i * t->stride(0), dtype_of(*t, kOp)));
  return read;
}

// What the ops are given, and the arrays that a problem points into.
struct Call {
  ChannelProblem p{};
  std::vector<int32_t> first_chunk;
  Ints topk;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& temperature, const OptTensor& topk_weight,
       const OptTensor& mask, const OptTensor& bounds, const OptTensor& order, bool normalize, const std::string& normalizer,
       const Ints& kept, const Ints& window, double scale, double eps)
      : topk(kept) {
    using torch::headeronly::ScalarType;
    check(q.dim() == 5 && k.dim() == 5 && v.dim() == 5, kOp, "q, k and v must have shape [B, Y, X, H, D]");
    for (int64_t i = 0; i < 4; ++i)
      check(k.size(i) == q.size(i) && v.size(i) == q.size(i), kOp, "k and v must have the tokens and heads of q");
    check(v.size(4) == k.size(4) && q.size(4) >= 1 && q.size(4) <= 256 && k.size(4) >= 1 && k.size(4) <= 256, kOp,
          "a head must have 1 to 256 channels, those of v as many as those of k");
    check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kOp, "k and v must have the dtype of q");
    check(q.size(1) * q.size(2) < (int64_t(1) << 31), kOp, "a sample must have fewer than 2^31 tokens");
    p.groups = temperature && q.size(3) >= 1 ? int32_t(temperature->numel() / q.size(3)) : 1;
    check(!temperature || (temperature->dim() == 1 && temperature->size(0) == p.groups * q.size(3) && p.groups >= 1 &&
                           q.size(4) % p.groups == 0),
          kOp, "temperature must have shape [H G], and G must divide the channels of q");
    check(!topk_weight || (topk_weight->dim() == 1 && topk_weight->size(0) == int64_t(kept.size())), kOp,
          "topk_weight must have one entry for each topk");
    p.q = view_of(q);
    p.k = view_of(k);
    p.v = view_of(v);
    p.batch = q.size(0);
    p.rows = int32_t(q.size(1));
    p.columns = int32_t(q.size(2));
    p.heads = int32_t(q.size(3));
    p.d = int32_t(q.size(4));
    p.e = int32_t(k.size(4));
    p.d_pitch = (p.d + 15) / 16 * 16;
    p.pitch = (p.e + 15) / 16 * 16;
    p.normalize = normalize;
    p.normalizer = normalizer == "softmax" ? ChannelNormalizer::softmax
                   : normalizer == "relu"  ? ChannelNormalizer::relu
                   : normalizer == "none"  ? ChannelNormalizer::none
                                           : ChannelNormalizer::plus1;
    check(p.normalizer != ChannelNormalizer::plus1 || normalizer == "plus1", kOp,
          "normalizer must be 'softmax', 'relu', 'none' or 'plus1'");
    p.topk_count = int32_t(topk.size());
    p.topk = topk.data();
    p.scale = scale;
    p.eps = eps;
    if (mask) {
      check(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == p.batch * p.rows * p.columns, kOp,
            "key_mask must be contiguous bool [B, Y, X]");
      p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    if (bounds) {
      check(bounds->scalar_type() == ScalarType::Int && bounds->dim() == 1 && bounds->is_contiguous() && bounds->size(0) >= 1 &&
                p.rows == 1 && p.batch <= 1,
            kOp, "cu_seqlens must be contiguous int32 [S + 1], and q packed");
      p.bounds = static_cast<const int32_t*>(bounds->const_data_ptr());
      p.windows = int32_t(bounds->size(0) - 1);
      bool inside = p.bounds[0] == 0 && p.bounds[p.windows] == p.columns;
      for (int32_t w = 0; w < p.windows; ++w) inside &= p.bounds[w] <= p.bounds[w + 1];
      check(inside, kOp, "cu_seqlens must ascend from 0 to the number of tokens");
    }
    if (order) {
      check(order->scalar_type() == ScalarType::Int && order->is_contiguous() && order->numel() == p.batch * p.columns && p.rows == 1,
            kOp, "order must be contiguous int32 [B, X]");
      p.order = static_cast<const int32_t*>(order->const_data_ptr());
      std::vector<uint8_t> seen(size_t(p.columns));
      for (int64_t b = 0; b < p.batch; ++b) {
        std::fill(seen.begin(), seen.end(), uint8_t(0));
        bool once = true;
        for (int32_t i = 0; i < p.columns && once; ++i) {
          const int32_t at = p.order[b * p.columns + i];
          once = uint32_t(at) < uint32_t(p.columns) && !seen[size_t(at)]++;
        }
        check(once, kOp, "order must be a permutation of the tokens");
      }
    }
    if (!bounds) {
      check(window.empty() || (window.size() == 2 && window[0] >= 1 && window[1] >= 1), kOp, "window must have two sides");
      const bool whole = window.empty();
      p.side_y = whole ? p.rows : int32_t(std::min<int64_t>(window[0], std::max(p.rows, 1)));
      p.side_x = whole ? p.columns : int32_t(std::min<int64_t>(window[1], std::max(p.columns, 1)));
      p.across = whole ? 1 : (p.columns + p.side_x - 1) / p.side_x;
      p.windows = whole ? 1 : (p.rows + p.side_y - 1) / p.side_y * p.across;
    }
    first_chunk.push_back(0);
    for (int32_t w = 0; w < p.windows; ++w) first_chunk.push_back(first_chunk.back() + (tokens(w) + kChannelChunk - 1) / kChannelChunk);
    p.chunks = first_chunk.back();
    p.first_chunk = first_chunk.data();
  }

  // Of a window; a packed sequence's own.
  int32_t tokens(int32_t w) const {
    if (p.bounds) return p.bounds[w + 1] - p.bounds[w];
    const int32_t y = w / p.across * p.side_y, x = w % p.across * p.side_x;
    return std::min(p.rows - y, p.side_y) * std::min(p.columns - x, p.side_x);
  }
  int64_t matrices() const { return p.batch * p.windows * p.heads; }

  // kernel over all chunks of all samples, several heads at a time where there are chunks enough for all threads.
  void over_chunks(const ChannelKernels& kernels, ChannelUnit kernel) const {
    const int64_t chunks = p.batch * p.chunks;
    if (chunks == 0) return;
    const int64_t parts = std::min<int64_t>(p.heads, (15 + chunks) / chunks), bytes = kernels.scratch_bytes(p);
    torch::stable::parallel_for(0, chunks * parts, 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes);
      for (int64_t t = first; t < last; ++t) {
        const int64_t part = t % parts, chunk = t / parts;
        kernel(p, chunk / p.chunks, int32_t(chunk % p.chunks), int32_t(p.heads * part / parts),
               int32_t(p.heads * (part + 1) / parts), scratch.data());
      }
    });
  }
  void over_matrices(const ChannelKernels& kernels, ChannelMatrix kernel) const {
    const int64_t bytes = kernels.scratch_bytes(p);
    torch::stable::parallel_for(0, matrices(), 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes);
      for (int64_t t = first; t < last; ++t)
        kernel(p, t / p.heads / p.windows, int32_t(t / p.heads % p.windows), int32_t(t % p.heads), scratch.data());
    });
  }
};

template <typename Acc>
const ChannelKernels& chosen() {
  if constexpr (sizeof(Acc) == 8) return kernels().channel_f64;
  else return kernels().channel_f32;
}

// Acc arrays of a call, without values: every element is written before it is read.
template <typename Acc>
struct State {
  std::vector<std::unique_ptr<Scratch>> parts;
  void* take(int64_t n) {
    parts.push_back(std::make_unique<Scratch>(std::max<int64_t>(n, 1) * int64_t(sizeof(Acc)), false));
    return parts.back()->data();
  }
};

std::tuple<Tensor, Tensor, Tensor> channel_attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor temperature, OptTensor topk_weight,
                                                         OptTensor mask, OptTensor bounds, OptTensor order, bool normalize,
                                                         std::string normalizer, Ints topk, Ints window, double scale, double eps,
                                                         std::string /*gpu*/) {
  Call call(q, k, v, temperature, topk_weight, mask, bounds, order, normalize, normalizer, topk, window, scale, eps);
  ChannelProblem& p = call.p;
  const Dtype wide = p.q.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  Tensor out = empty_as(q), gram = new_tensor({p.batch, p.windows, p.heads, p.d, p.e}, wide);
  Tensor squares = new_tensor({p.batch, p.windows, p.heads, p.d + p.e}, wide);
  p.out = view_of(out);
  p.gram = const_cast<void*>(gram.const_data_ptr());
  p.squares = const_cast<void*>(squares.const_data_ptr());
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    const ChannelKernels& k = chosen<Acc>();
    const std::vector<Acc> heat = numbers<Acc>(temperature), mix = numbers<Acc>(topk_weight);
    State<Acc> state;
    const int64_t units = p.batch * p.chunks * p.heads;
    p.temperature = temperature ? heat.data() : nullptr;
    p.topk_weight = topk_weight ? mix.data() : nullptr;
    p.partial = state.take(units * p.d * p.pitch);
    p.partial_squares = state.take(units * (p.d_pitch + p.pitch));
    p.p = state.take(call.matrices() * p.d * p.pitch);
    call.over_chunks(k, k.products);
    call.over_matrices(k, k.weights);
    call.over_chunks(k, k.apply);
  };
  wide == Dtype::f64 ? run(double()) : run(float());
  return {out, gram, squares};
}

// The sum over samples and windows of numbers [B][W][n], as a tensor of shape [n].
template <typename Acc>
Tensor summed(const void* each, int64_t count, int64_t n, Dtype dtype) {
  Tensor total = new_tensor({n}, dtype);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += double(static_cast<const Acc*>(each)[j * n + i]);
    set_scalar<double>(const_cast<void*>(total.const_data_ptr()), i, dtype, sum);
  }
  return total;
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> channel_attention_bwd(
    OptTensor dout, OptTensor dgram, OptTensor dsquares, Tensor gram, Tensor squares, Tensor q, Tensor k, Tensor v,
    OptTensor temperature, OptTensor topk_weight, OptTensor mask, OptTensor bounds, OptTensor order, bool normalize,
    std::string normalizer, Ints topk, Ints window, double scale, double eps, std::string /*gpu*/, int64_t need) {
  Call call(q, k, v, temperature, topk_weight, mask, bounds, order, normalize, normalizer, topk, window, scale, eps);
  ChannelProblem& p = call.p;
  const Dtype wide = p.q.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  OptTensor dq, dk, dv, dtemperature, dweight;
  if (need & 1) p.dq = view_of(*(dq = empty_as(q)));
  if (need & 2) p.dk = view_of(*(dk = empty_as(k)));
  if (need & 4) p.dv = view_of(*(dv = empty_as(v)));
  for (OptTensor* t : {&dgram, &dsquares})
    if (*t) *t = torch::stable::contiguous(**t);
  if (!dout) dout = torch::stable::new_zeros(q, {p.batch, p.rows, p.columns, p.heads, p.d});
  p.dout = view_of(*dout);
  p.gram = const_cast<void*>(gram.const_data_ptr());
  p.squares = const_cast<void*>(squares.const_data_ptr());
  p.dgram = dgram ? dgram->const_data_ptr() : nullptr;
  p.dsquares = dsquares ? dsquares->const_data_ptr() : nullptr;
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    const ChannelKernels& k = chosen<Acc>();
    const std::vector<Acc> heat = numbers<Acc>(temperature), mix = numbers<Acc>(topk_weight);
    State<Acc> state;
    p.temperature = temperature ? heat.data() : nullptr;
    p.topk_weight = topk_weight ? mix.data() : nullptr;
    p.partial = state.take(p.batch * p.chunks * p.heads * p.d * p.pitch);
    p.p = state.take(call.matrices() * p.d * p.pitch);
    p.slope = state.take(call.matrices() * p.d * p.pitch);
    p.slope_squares = state.take(call.matrices() * (p.d_pitch + p.pitch));
    p.dtemperature = state.take(call.matrices() * p.groups);
    p.dtopk_weight = state.take(call.matrices() * p.topk_count);
    call.over_chunks(k, k.back_products);
    call.over_matrices(k, k.slopes);
    if (dq || dk || dv) call.over_chunks(k, k.gradients);
    if (need & 8 && temperature)
      dtemperature = summed<Acc>(p.dtemperature, p.batch * p.windows, p.heads * p.groups, dtype_of(*temperature, kOp));
    if (need & 16 && topk_weight)
      dweight = summed<Acc>(p.dtopk_weight, call.matrices(), p.topk_count, dtype_of(*topk_weight, kOp));
  };
  wide == Dtype::f64 ? run(double()) : run(float());
  return {dq, dk, dv, dtemperature, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("channel_attention_fwd", TORCH_BOX(&channel_attention_fwd));
  m.impl("channel_attention", TORCH_BOX(&channel_attention_fwd));
  m.impl("channel_attention_bwd", TORCH_BOX(&channel_attention_bwd));
}

}  // namespace vitkern
