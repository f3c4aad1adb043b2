// attention on the CPU: a task is a sample, a kv head and some queries; in the backward all queries of some heads.
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
constexpr const char* kOp = "attention";
constexpr int64_t kBlockBytes = 262144;  // of the scores of a block of queries

struct Options {
  OptTensor bias, key_bias, mask, factor, sink, seed;
  std::string normalizer;
  double scale;
  bool causal;
  int64_t offset;
  double dropout_p;
};

struct Prepared {
  AttentionProblem p{};
  const AttentionKernels* kernels;
  std::vector<double> factor, sink;
  bool wide;
};

// A tensor [B, N, H, D], or [B, N, H].
HeadsView heads_view(const Tensor& t) {
  check(t.dim() == 3 || t.dim() == 4, kOp, "q, k and v must have shape [B, N, H, D]");
  return {{static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), t.stride(0), t.stride(1),
           t.dim() == 4 ? t.stride(3) : 1},
          t.stride(2)};
}

// A tensor that broadcasts to [B, H, Nq, Nk].
ScoreView score_view(const Tensor& t, const int64_t (&shape)[4], Dtype dtype) {
  check(t.dim() == 4, kOp, "score-shaped tensors must have 4 axes");
  int64_t stride[4];
  for (int a = 0; a < 4; ++a) {
    check(t.size(a) == 1 || t.size(a) == shape[a], kOp, "bias and mask must broadcast to [B, H, Nq, Nk]");
    stride[a] = t.size(a) == 1 ? 0 : t.stride(a);
  }
  return {static_cast<const char*>(t.const_data_ptr()), dtype, stride[0], stride[1], stride[2], stride[3]};
}

std::vector<double> per_head(const Tensor& t, int64_t heads) {
  check(t.dim() == 1 && t.size(0) == heads, kOp, "scale and sink must have shape [H]");
  std::vector<double> values;
  for (int64_t h = 0; h < heads; ++h) values.push_back(scalar<double>(t.const_data_ptr(), h * t.stride(0), dtype_of(t, kOp)));
  return values;
}

Prepared prepare(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  Prepared c;
  AttentionProblem& p = c.p;
  p.q = heads_view(q);
  p.k = heads_view(k);
  p.v = heads_view(v);
  const int64_t most = int64_t(1) << 30;
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(2) >= 1 &&
            q.size(2) % k.size(2) == 0 && v.size(2) == k.size(2) && v.size(1) == k.size(1) && k.size(3) == q.size(3) &&
            q.size(1) < most && k.size(1) < most && q.size(3) <= 256 && v.size(3) <= 256,
        kOp, "q, k and v do not fit together");
  p.batch = q.size(0);
  p.queries = int32_t(q.size(1));
  p.keys = int32_t(k.size(1));
  p.heads = int32_t(q.size(2));
  p.kv_heads = int32_t(k.size(2));
  p.depth = int32_t(q.size(3));
  p.width = int32_t(v.size(3));
  c.wide = p.q.rows.dtype == Dtype::f64;
  const Kernels& table = kernels();
  c.kernels = c.wide ? &table.attention_f64 : &table.attention_f32;
  const int32_t lanes = c.wide ? table.lanes / 2 : table.lanes;
  p.padded = (p.keys + lanes - 1) / lanes * lanes;
  const int64_t row = int64_t(std::max(p.padded, 1)) * (c.wide ? 8 : 4);
  p.block = int32_t(std::clamp<int64_t>(kBlockBytes / row, 8, 64));
  const int64_t shape[4] = {p.batch, p.heads, p.queries, p.keys};
  if (o.bias) p.bias = score_view(*o.bias, shape, dtype_of(*o.bias, kOp));
  if (o.key_bias) p.key_bias = score_view(*o.key_bias, shape, dtype_of(*o.key_bias, kOp));
  check(p.key_bias.row == 0, kOp, "key_bias must have one row");
  if (o.mask) {
    check(o.mask->scalar_type() == torch::headeronly::ScalarType::Bool, kOp, "mask must be bool");
    p.mask = score_view(*o.mask, shape, Dtype::f32);
  }
  c.factor = o.factor ? per_head(*o.factor, p.heads) : std::vector<double>(size_t(p.heads), o.scale);
  if (o.sink) c.sink = per_head(*o.sink, p.heads);
  p.normalizer = o.normalizer == "softmax"   ? Normalizer::softmax
                 : o.normalizer == "sigmoid" ? Normalizer::sigmoid
                 : o.normalizer == "relu"    ? Normalizer::relu
                                             : Normalizer::none;
  check(p.normalizer != Normalizer::none || o.normalizer == "none", kOp, "normalizer must be softmax, sigmoid, relu or none");
  p.causal = o.causal;
  p.offset = o.offset;
  p.dropout_p = o.dropout_p;
  if (o.seed) p.seed = uint64_t(*static_cast<const int64_t*>(o.seed->const_data_ptr()));
  p.factor = c.factor.data();  // a vector that moves keeps its elements where they are
  p.sink = o.sink ? c.sink.data() : nullptr;
  return c;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor bias, OptTensor key_bias, OptTensor mask,
                                         OptTensor factor, OptTensor sink, OptTensor seed, std::string normalizer,
                                         double scale, bool causal, int64_t offset, double dropout_p, std::string /*gpu*/) {
  Prepared c = prepare(q, k, v, {bias, key_bias, mask, factor, sink, seed, normalizer, scale, causal, offset, dropout_p});
  AttentionProblem& p = c.p;
  const bool softmax = p.normalizer == Normalizer::softmax;
  Tensor out = new_tensor({p.batch, p.queries, p.heads, p.width}, p.v.rows.dtype);
  Tensor lse = new_tensor({p.batch, p.queries, p.heads}, c.wide ? Dtype::f64 : Dtype::f32);
  p.out = heads_view(out);
  if (softmax) p.lse = heads_view(lse);
  else std::memset(lse.mutable_data_ptr(), 0, size_t(lse.numel()) * (c.wide ? 8 : 4));
  // Keys are packed anew in every task: parts of the queries only where samples and heads do not occupy the threads.
  const int64_t units = p.batch * p.kv_heads, blocks = (p.queries + p.block - 1) / p.block;
  const int64_t parts = std::clamp<int64_t>(units ? 64 / units : 1, 1, std::max<int64_t>(blocks / 4, 1));
  const int64_t bytes = c.kernels->scratch_bytes(p, false);
  torch::stable::parallel_for(0, units * parts, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t t = first; t < last; ++t) {
      const int64_t unit = t / parts, part = t % parts;
      const int32_t begin = int32_t(blocks * part / parts * p.block), end = int32_t(blocks * (part + 1) / parts * p.block);
      c.kernels->forward(p, unit / p.kv_heads, int32_t(unit % p.kv_heads), begin, std::min(end, p.queries), scratch.data());
    }
  });
  return {out, lse};
}

// The sums that one bias takes from all samples and heads that share it. Families of samples and heads that add to one place
// are cut into chunks, each with sums of its own, which are added in order: fixed by the problem, not by the threads.
template <typename Acc>
struct BiasSums {
  int64_t sizes[4] = {1, 1, 1, 1}, row = 0, total = 0, samples = 1, heads = 1, chunks = 1;
  std::vector<Acc> data;

  BiasSums(const AttentionProblem& p, const OptTensor& bias) {
    // a family is what the tasks of one place in [samples][heads] add to
    samples = p.batch;
    heads = p.kv_heads;
    if (!bias) return;
    for (int a = 0; a < 4; ++a) sizes[a] = bias->size(a);
    row = sizes[3] == 1 ? 1 : p.padded;
    total = sizes[0] * sizes[1] * sizes[2] * row;
    if (sizes[0] == 1) samples = 1;
    if (sizes[1] == 1) heads = 1;
    const int64_t members = family(p), families = samples * heads;
    const int64_t fit = (int64_t(64) << 20) / std::max<int64_t>(total * int64_t(sizeof(Acc)), 1);
    chunks = std::clamp<int64_t>(std::min(16 / std::max<int64_t>(families, 1), fit), 1, std::max<int64_t>(members, 1));
    data.assign(size_t(total * chunks), Acc(0));
  }
  int64_t family(const AttentionProblem& p) const {
    return samples * heads ? p.batch * p.kv_heads / (samples * heads) : 0;
  }
  // The member-th (sample, kv head) of a family.
  std::pair<int64_t, int64_t> unit(const AttentionProblem& p, int64_t of, int64_t member) const {
    const int64_t inner = p.kv_heads / heads;
    const int64_t sample = samples == 1 ? member / inner : of / heads;
    const int64_t head = heads == 1 ? member % inner : of % heads;
    return {sample, head};
  }
  AttentionSums chunk(int64_t i) {
    AttentionSums s{};
    if (total == 0) return s;
    s.bias = data.data() + i * total;
    s.bias_row = sizes[2] == 1 ? 0 : row;
    s.bias_head = sizes[1] == 1 ? 0 : sizes[2] * row;
    s.bias_batch = sizes[0] == 1 ? 0 : sizes[1] * sizes[2] * row;
    s.bias_column = sizes[3] != 1;
    return s;
  }
  Tensor gradient(Dtype dtype) {
    Tensor grad = new_tensor({sizes[0], sizes[1], sizes[2], sizes[3]}, dtype);
    const int64_t rows = sizes[0] * sizes[1] * sizes[2], columns = sizes[3];
    with_element(dtype, [&](auto element) {
      using T = decltype(element);
      T* to = static_cast<T*>(grad.mutable_data_ptr());
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1)), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
          for (int64_t j = 0; j < columns; ++j) {
            Acc sum = data[size_t(r * row + j)];
            for (int64_t c = 1; c < chunks; ++c) sum += data[size_t(c * total + r * row + j)];
            to[r * columns + j] = narrowed<T>(sum);
          }
      });
    });
    return grad;
  }
};

// [H] from one value of every sample and head.
Tensor head_sums(const std::vector<double>& each, int64_t batch, int64_t heads, Dtype dtype) {
  Tensor grad = new_tensor({heads}, dtype);
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += each[size_t(b * heads + h)];
    set_scalar<double>(grad.mutable_data_ptr(), h, dtype, sum);
  }
  return grad;
}

// The gradient of key_bias, of its shape, from that of every sample and head.
template <typename Acc>
Tensor key_sums(const Tensor& like, const std::vector<Acc>& each, const AttentionProblem& p) {
  const Dtype dtype = dtype_of(like, kOp);
  Tensor grad = new_tensor({like.size(0), like.size(1), like.size(2), like.size(3)}, dtype);
  const int64_t columns = like.size(3);
  std::vector<Acc> sums(size_t(grad.numel()), Acc(0));
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t place = (like.size(0) == 1 ? 0 : b) * like.size(1) + (like.size(1) == 1 ? 0 : h);
      const Acc* from = &each[size_t((b * p.heads + h) * p.keys)];
      for (int64_t j = 0; j < p.keys; ++j) sums[size_t(place * columns + (columns == 1 ? 0 : j))] += from[j];
    }
  void* to = grad.mutable_data_ptr();
  for (size_t i = 0; i < sums.size(); ++i) set_scalar<Acc>(to, int64_t(i), dtype, sums[i]);
  return grad;
}

using Gradients = std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor>;

template <typename Acc>
Gradients backward(Prepared& c, const Options& o, int64_t need) {
  AttentionProblem& p = c.p;
  Tensor dq = new_tensor({p.batch, p.queries, p.heads, p.depth}, p.q.rows.dtype);
  Tensor dk = new_tensor({p.batch, p.keys, p.kv_heads, p.depth}, p.k.rows.dtype);
  Tensor dv = new_tensor({p.batch, p.keys, p.kv_heads, p.width}, p.v.rows.dtype);
  p.dq = heads_view(dq);
  p.dk = heads_view(dk);
  p.dv = heads_view(dv);
  const bool of_bias = need & 8 && o.bias, of_keys = need & 16 && o.key_bias;
  const bool of_factor = need & 32 && o.factor, of_sink = need & 64 && o.sink;
  BiasSums<Acc> sums(p, of_bias ? o.bias : std::nullopt);
  std::vector<Acc> keys(of_keys ? size_t(p.batch * p.heads * p.keys) : 0);
  std::vector<double> factor(of_factor ? size_t(p.batch * p.heads) : 0), sink(of_sink ? size_t(p.batch * p.heads) : 0);
  const int64_t families = sums.samples * sums.heads, members = sums.family(p);
  const int64_t bytes = c.kernels->scratch_bytes(p, true);
  torch::stable::parallel_for(0, families * sums.chunks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t t = first; t < last; ++t) {
      const int64_t chunk = t % sums.chunks;
      AttentionSums s = sums.chunk(chunk);
      s.key_bias = of_keys ? keys.data() : nullptr;
      s.factor = of_factor ? factor.data() : nullptr;
      s.sink = of_sink ? sink.data() : nullptr;
      for (int64_t m = members * chunk / sums.chunks; m < members * (chunk + 1) / sums.chunks; ++m) {
        const auto [sample, head] = sums.unit(p, t / sums.chunks, m);
        c.kernels->backward(p, sample, int32_t(head), s, scratch.data());
      }
    }
  });
  const auto wanted = [need](int bit, const Tensor& t) { return need >> bit & 1 ? OptTensor(t) : OptTensor(); };
  OptTensor dbias, dkeys, dfactor, dsink;
  if (of_bias) dbias = sums.gradient(dtype_of(*o.bias, kOp));
  if (of_keys) dkeys = key_sums<Acc>(*o.key_bias, keys, p);
  if (of_factor) dfactor = head_sums(factor, p.batch, p.heads, dtype_of(*o.factor, kOp));
  if (of_sink) dsink = head_sums(sink, p.batch, p.heads, dtype_of(*o.sink, kOp));
  return {wanted(0, dq), wanted(1, dk), wanted(2, dv), dbias, dkeys, dfactor, dsink};
}

Gradients attention_bwd(OptTensor dout, OptTensor dlse, Tensor /*lse*/, Tensor q, Tensor k, Tensor v, OptTensor bias,
                        OptTensor key_bias, OptTensor mask, OptTensor factor, OptTensor sink, OptTensor seed,
                        std::string normalizer, double scale, bool causal, int64_t offset, double dropout_p,
                        std::string /*gpu*/, int64_t need) {
  const Options o{bias, key_bias, mask, factor, sink, seed, normalizer, scale, causal, offset, dropout_p};
  Prepared c = prepare(q, k, v, o);
  if (dout) {
    check(dout->dim() == 4 && dout->size(1) == q.size(1) && dout->size(3) == v.size(3), kOp, "the gradient must be of out's shape");
    c.p.dout = heads_view(*dout);
  }
  if (dlse && c.p.normalizer == Normalizer::softmax) c.p.dlse = heads_view(*dlse);
  return c.wide ? backward<double>(c, o, need) : backward<float>(c, o, need);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace vitkern
