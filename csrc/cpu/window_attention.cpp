// window_attention on the CPU: tensors to plain pointers, tasks to threads, partial sums to gradients.
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

#include "kernels.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "window_attention";

// The options of a call after the lowering of vitkern/ops/window_attention.py, in schema order.
struct Options {
  OptTensor bias, index, logit_scale, k_pad, v_pad, seed;
  std::vector<int64_t> window, shift;
  bool roll_first, pad_visible;
  double scale, mask_value, cosine_max, cosine_eps, dropout_p;
};

// Bits of `need`, and the order of the gradients.
enum Need { kNeedQ = 1, kNeedK = 2, kNeedV = 4, kNeedBias = 8, kNeedScale = 16, kNeedKPad = 32, kNeedVPad = 64 };

// Scores and sums of double tensors are double, of all others float.
bool is_double(const MapView& t) { return t.dtype == Dtype::f64; }

// Everything about a call that lives beside the problem: the converted options, kept alive while the kernels run.
struct Prepared {
  WindowProblem p{};
  std::vector<int64_t> lengths;
  std::vector<char> bias, k_pad, v_pad;
  std::vector<double> temperature;
  const WindowKernels* kernels;
  int64_t element;  // bytes of Acc
};

void set_geometry(Prepared& c, const Options& o) {
  WindowMap& m = c.p.map;
  m.rank = int32_t(c.lengths.size());
  check(m.rank >= 1 && m.rank <= kMaxAxes && int64_t(o.window.size()) == m.rank && int64_t(o.shift.size()) == m.rank,
        kOp, "window and shift must have one entry per axis of the map, at most 4");
  m.roll_first = o.roll_first;
  int64_t size = 1, windows = 1;
  for (int32_t a = 0; a < m.rank; ++a) {
    const int64_t w = o.window[a], s = o.shift[a], count = (c.lengths[a] + w - 1) / w;
    check(w >= 1 && s >= 0 && s < w, kOp, "every axis needs 0 <= shift < window");
    size *= w;
    windows *= count;
    check(size < (1 << 24) && windows <= std::numeric_limits<int32_t>::max() && count * w < (int64_t(1) << 30), kOp,
          "the map or the window is too large");
    m.axis[a] = {int32_t(c.lengths[a]), int32_t(w), int32_t(s), int32_t(count)};
  }
  m.size = int32_t(size);
  m.windows = int32_t(windows);
}

// The bias of every head, in score units, as rows of p.padded: gathered from the table or copied from a dense tensor.
template <typename Acc>
void set_bias(Prepared& c, const Options& o) {
  WindowProblem& p = c.p;
  const int64_t n = p.map.size, padded = p.padded;
  const Acc none = -std::numeric_limits<Acc>::infinity(), unit = Acc(1 / score_unit<Acc>());
  const int64_t heads = o.bias ? p.heads : 1, rows = o.bias ? n : 1;
  c.bias.resize(size_t(heads * rows * padded) * sizeof(Acc));
  Acc* out = reinterpret_cast<Acc*>(c.bias.data());
  p.bias = out;
  p.bias_head = o.bias ? n * padded : 0;
  p.bias_row = o.bias ? padded : 0;
  if (!o.bias) {
    for (int64_t j = 0; j < padded; ++j) out[j] = j < n ? Acc(0) : none;
    return;
  }
  const Tensor& bias = *o.bias;
  const auto stride = bias.strides();
  const Acc* table = nullptr;  // [heads][table_rows]
  std::vector<Acc> kept;
  const int32_t* index = nullptr;
  int64_t index_row = 0, index_col = 0, table_rows = 0;
  if (o.index) {
    index = static_cast<const int32_t*>(o.index->const_data_ptr());
    index_row = o.index->stride(0);
    index_col = o.index->stride(1);
    table_rows = bias.size(0);
    check_index(*o.index, table_rows, kOp);
    kept.resize(size_t(heads * table_rows));
    table = kept.data();
  }
  with_element(dtype_of(bias, kOp), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(bias.const_data_ptr());
    for (int64_t h = 0; table && h < heads; ++h)
      for (int64_t r = 0; r < table_rows; ++r)
        kept[size_t(h * table_rows + r)] = widened<Acc>(data[r * stride[0] + h * stride[1]]) * unit;
    torch::stable::parallel_for(0, heads * n, std::max<int64_t>(1, 65536 / n), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t h = r / n, i = r % n;
        Acc* row = out + r * padded;
        if (table) {
          const int32_t* entry = index + i * index_row;
          for (int64_t j = 0; j < n; ++j) row[j] = table[h * table_rows + entry[j * index_col]];
        } else {
          const T* from = data + h * stride[0] + i * stride[1];
          for (int64_t j = 0; j < n; ++j) row[j] = widened<Acc>(from[j * stride[2]]) * unit;
        }
        for (int64_t j = n; j < padded; ++j) row[j] = none;
      }
    });
  });
}

// Copies a tensor [rows, columns] (or [rows]) of any strides as Acc.
template <typename Acc>
const void* converted(const Tensor& t, std::vector<char>& keep) {
  const int64_t rows = t.size(0), columns = t.dim() > 1 ? t.size(1) : 1;
  const Dtype dtype = dtype_of(t, kOp);
  keep.resize(size_t(rows * columns) * sizeof(Acc));
  Acc* out = reinterpret_cast<Acc*>(keep.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out[i * columns + j] = scalar<Acc>(t.const_data_ptr(), i * t.stride(0) + (t.dim() > 1 ? j * t.stride(1) : 0), dtype);
  return out;
}

template <typename Acc>
void set_options(Prepared& c, const Options& o) {
  WindowProblem& p = c.p;
  set_bias<Acc>(c, o);
  if (o.k_pad) p.k_pad = converted<Acc>(*o.k_pad, c.k_pad);
  if (o.v_pad) p.v_pad = converted<Acc>(*o.v_pad, c.v_pad);
  if (o.logit_scale) {
    for (int32_t h = 0; h < p.heads; ++h) {
      const double tau = scalar<double>(o.logit_scale->const_data_ptr(), h * o.logit_scale->stride(0), dtype_of(*o.logit_scale, kOp));
      c.temperature.push_back(std::exp(tau > o.cosine_max ? o.cosine_max : tau));
    }
    p.temperature = c.temperature.data();
  }
  p.pad_visible = o.pad_visible;
  p.scale = o.scale;
  p.mask_value = o.mask_value;
  p.eps = o.cosine_eps;
  p.dropout_p = o.dropout_p;
  if (o.seed) {
    const int64_t count = o.seed->numel();
    check(o.seed->scalar_type() == torch::headeronly::ScalarType::Long && o.seed->is_contiguous() && (count == 1 || count == 2),
          kOp, "seed must be int64 [1] or [2] and contiguous");
    const auto* stream = static_cast<const int64_t*>(o.seed->const_data_ptr());
    p.seed = uint64_t(stream[0]);
    if (count == 2) p.first_head = uint32_t(stream[1]), p.first_image = uint32_t(uint64_t(stream[1]) >> 32);
  }
}

// q, k, v are maps [B, *L, H, D]; the options are read and converted.
Prepared prepare(const Map& q, const Map& k, const Map& v, const Options& o) {
  Prepared c;
  WindowProblem& p = c.p;
  c.lengths = q.lengths;
  set_geometry(c, o);
  p.batch = q.batch;
  p.heads = int32_t(q.heads);
  p.kv_heads = int32_t(k.heads);
  p.d = int32_t(q.width);
  p.dv = int32_t(v.width);
  check(k.heads > 0 && q.heads % k.heads == 0 && v.heads == k.heads && k.width == q.width && k.lengths == q.lengths &&
            v.lengths == q.lengths && k.batch == q.batch && v.batch == q.batch,
        kOp, "q, k and v do not fit together");
  p.view[kQ] = q.view;
  p.view[kK] = k.view;
  p.view[kV] = v.view;
  const Kernels& table = kernels();
  c.kernels = is_double(q.view) ? &table.window_f64 : &table.window_f32;
  c.element = is_double(q.view) ? 8 : 4;
  const int64_t lanes = is_double(q.view) ? table.lanes / 2 : table.lanes;
  p.padded = int32_t((p.map.size + lanes - 1) / lanes * lanes);
  is_double(q.view) ? set_options<double>(c, o) : set_options<float>(c, o);
  return c;
}

// [first, last) of `total` for part i of `parts`.
std::pair<int64_t, int64_t> share(int64_t total, int64_t i, int64_t parts) {
  return {total * i / parts, total * (i + 1) / parts};
}

std::tuple<Tensor, Tensor> forward(const Map& q, const Map& k, const Map& v, const Options& o) {
  Prepared c = prepare(q, k, v, o);
  WindowProblem& p = c.p;
  Tensor out = new_map(q.lengths, {q.batch, q.heads, v.width}, v.view.dtype);
  Tensor lse = new_map(q.lengths, {q.batch, q.heads}, is_double(q.view) ? Dtype::f64 : Dtype::f32);
  p.view[kOut] = as_map(out, 1, kOp).view;
  p.view[kLse] = as_map(lse, 0, kOp).view;
  const int64_t windows = p.batch * p.map.windows;
  // A task is some windows and all heads, or some heads where windows are too few to occupy the threads.
  const int64_t groups = std::min<int64_t>(windows, 256);
  const int64_t blocks = std::clamp<int64_t>(64 / std::max<int64_t>(windows, 1), 1, p.kv_heads);
  const int64_t bytes = c.kernels->scratch_bytes(p, false);
  torch::stable::parallel_for(0, groups * blocks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t t = first; t < last; ++t) {
      const auto range = share(windows, t / blocks, groups);
      const auto heads = share(p.kv_heads, t % blocks, blocks);
      c.kernels->forward(p, range.first, range.second, int32_t(heads.first), int32_t(heads.second), scratch.data());
    }
  });
  return {out, lse};
}

// Chunks of windows whose partial sums are kept apart: fixed by the problem, never by the number of threads.
int64_t chunk_count(int64_t windows, int64_t bytes_of_one) {
  const int64_t fit = std::max<int64_t>(4, (int64_t(64) << 20) / std::max<int64_t>(bytes_of_one, 1));
  return std::max<int64_t>(1, std::min({windows / 8, fit, int64_t(32)}));
}

// Partial sums of all chunks: one block of Acc per chunk, cut into bias, temperature, k_pad, v_pad.
struct Partials {
  int64_t bias = 0, temperature = 0, k_pad = 0, v_pad = 0, chunks = 0;
  std::vector<char> data;
  int64_t total() const { return bias + temperature + k_pad + v_pad; }
  template <typename Acc>
  WindowSums chunk(int64_t i) {
    Acc* base = reinterpret_cast<Acc*>(data.data()) + i * total();
    return {bias ? base : nullptr, temperature ? base + bias : nullptr, k_pad ? base + bias + temperature : nullptr,
            v_pad ? base + bias + temperature + k_pad : nullptr};
  }
  // Adds the chunks in order into the first.
  template <typename Acc>
  void reduce() {
    Acc* base = reinterpret_cast<Acc*>(data.data());
    const int64_t n = total();
    torch::stable::parallel_for(0, n, 65536, [&](int64_t first, int64_t last) {
      for (int64_t c = 1; c < chunks; ++c)
        for (int64_t i = first; i < last; ++i) base[i] += base[c * n + i];
    });
  }
};

template <typename Acc>
Tensor bias_gradient(const WindowProblem& p, const Options& o, const Acc* sum) {
  const int64_t n = p.map.size;
  const Dtype dtype = dtype_of(*o.bias, kOp);
  if (!o.index) {
    Tensor grad = new_tensor({p.heads, n, n}, dtype);
    with_element(dtype, [&](auto element) {
      using T = decltype(element);
      T* to = static_cast<T*>(grad.mutable_data_ptr());
      torch::stable::parallel_for(0, p.heads * n, std::max<int64_t>(1, 65536 / n), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
          for (int64_t j = 0; j < n; ++j) to[r * n + j] = narrowed<T>(sum[r * p.padded + j]);
      });
    });
    return grad;
  }
  const int64_t rows = o.bias->size(0);
  Tensor grad = new_tensor({rows, p.heads}, dtype);
  const int32_t* index = static_cast<const int32_t*>(o.index->const_data_ptr());
  const int64_t index_row = o.index->stride(0), index_col = o.index->stride(1);
  void* to = grad.mutable_data_ptr();
  torch::stable::parallel_for(0, p.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<Acc> table(static_cast<size_t>(rows));
    for (int64_t h = first; h < last; ++h) {
      std::fill(table.begin(), table.end(), Acc(0));
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
          table[size_t(index[i * index_row + j * index_col])] += sum[(h * n + i) * p.padded + j];
      for (int64_t r = 0; r < rows; ++r) set_scalar<Acc>(to, r * p.heads + h, dtype, table[size_t(r)]);
    }
  });
  return grad;
}

template <typename Acc>
Tensor vector_gradient(const Tensor& like, const Acc* sum) {
  const Dtype dtype = dtype_of(like, kOp);
  const auto sizes = like.sizes();
  Tensor grad = new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
  void* to = grad.mutable_data_ptr();
  for (int64_t i = 0, count = like.numel(); i < count; ++i) set_scalar<Acc>(to, i, dtype, sum[i]);
  return grad;
}

// Gradients of bias (or table), logit_scale, k_pad, v_pad.
using OptionGradients = std::tuple<OptTensor, OptTensor, OptTensor, OptTensor>;

template <typename Acc>
OptionGradients run_backward(const Prepared& c, const Options& o, int64_t need) {
  const WindowProblem& p = c.p;
  Partials sums;
  sums.bias = need & kNeedBias && o.bias ? int64_t(p.heads) * p.map.size * p.padded : 0;
  sums.temperature = need & kNeedScale && o.logit_scale ? p.heads : 0;
  sums.k_pad = need & kNeedKPad && o.k_pad ? int64_t(p.kv_heads) * p.d : 0;
  sums.v_pad = need & kNeedVPad && o.v_pad ? int64_t(p.kv_heads) * p.dv : 0;
  const int64_t windows = p.batch * p.map.windows;
  sums.chunks = chunk_count(windows, sums.total() * int64_t(sizeof(Acc)));
  sums.data.resize(size_t(sums.chunks * sums.total()) * sizeof(Acc));
  const int64_t blocks = sums.chunks >= 16 ? 1 : p.kv_heads;
  const int64_t bytes = c.kernels->scratch_bytes(p, true);
  torch::stable::parallel_for(0, sums.chunks * blocks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes);
    for (int64_t t = first; t < last; ++t) {
      const auto range = share(windows, t / blocks, sums.chunks);
      const auto heads = share(p.kv_heads, t % blocks, blocks);
      c.kernels->backward(p, range.first, range.second, int32_t(heads.first), int32_t(heads.second),
                          sums.chunk<Acc>(t / blocks), scratch.data());
    }
  });
  sums.reduce<Acc>();
  const WindowSums all = sums.chunk<Acc>(0);
  OptionGradients grads;
  if (all.bias) std::get<0>(grads) = bias_gradient<Acc>(p, o, static_cast<const Acc*>(all.bias));
  if (all.temperature) {
    Acc* t = static_cast<Acc*>(all.temperature);
    for (int32_t h = 0; h < p.heads; ++h) {
      const double tau = scalar<double>(o.logit_scale->const_data_ptr(), h * o.logit_scale->stride(0), dtype_of(*o.logit_scale, kOp));
      if (tau > o.cosine_max) t[h] = 0;
    }
    std::get<1>(grads) = vector_gradient<Acc>(*o.logit_scale, t);
  }
  if (all.k_pad) std::get<2>(grads) = vector_gradient<Acc>(*o.k_pad, static_cast<const Acc*>(all.k_pad));
  if (all.v_pad) std::get<3>(grads) = vector_gradient<Acc>(*o.v_pad, static_cast<const Acc*>(all.v_pad));
  return grads;
}

// dq, dk, dv are maps to write; every token is written exactly once.
OptionGradients backward(const OptTensor& dout, const OptTensor& dlse, const Map& q, const Map& k, const Map& v,
                         const Options& o, const Map& dq, const Map& dk, const Map& dv, int64_t need) {
  Prepared c = prepare(q, k, v, o);
  WindowProblem& p = c.p;
  if (dout) p.view[kDout] = as_map(*dout, 1, kOp).view;
  if (dlse) p.view[kDlse] = as_map(*dlse, 0, kOp).view;
  p.view[kDq] = dq.view;
  p.view[kDk] = dk.view;
  p.view[kDv] = dv.view;
  return is_double(q.view) ? run_backward<double>(c, o, need) : run_backward<float>(c, o, need);
}

#define VITKERN_OPTIONS                                                                                            \
  OptTensor bias, OptTensor index, OptTensor logit_scale, OptTensor k_pad, OptTensor v_pad, OptTensor seed,        \
      std::vector<int64_t> window, std::vector<int64_t> shift, bool roll_first, bool pad_visible, double scale,    \
      double mask_value, double cosine_max, double cosine_eps, double dropout_p, std::string
#define VITKERN_COLLECT                                                                                            \
  Options {                                                                                                        \
    bias, index, logit_scale, k_pad, v_pad, seed, std::move(window), std::move(shift), roll_first, pad_visible,    \
        scale, mask_value, cosine_max, cosine_eps, dropout_p                                                       \
  }

std::tuple<Tensor, Tensor> window_attention_fwd(Tensor q, Tensor k, Tensor v, VITKERN_OPTIONS) {
  return forward(as_map(q, 1, kOp), as_map(k, 1, kOp), as_map(v, 1, kOp), VITKERN_COLLECT);
}

std::tuple<Tensor, Tensor> window_attention_qkvpacked_fwd(Tensor qkv, VITKERN_OPTIONS) {
  return forward(packed_map(qkv, 0, kOp), packed_map(qkv, 1, kOp), packed_map(qkv, 2, kOp), VITKERN_COLLECT);
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> window_attention_bwd(
    OptTensor dout, OptTensor dlse, Tensor /*lse*/, Tensor q, Tensor k, Tensor v, VITKERN_OPTIONS, int64_t need) {
  const Map qm = as_map(q, 1, kOp), km = as_map(k, 1, kOp), vm = as_map(v, 1, kOp);
  Tensor dq = new_map(qm.lengths, {qm.batch, qm.heads, qm.width}, qm.view.dtype);
  Tensor dk = new_map(km.lengths, {km.batch, km.heads, km.width}, km.view.dtype);
  Tensor dv = new_map(vm.lengths, {vm.batch, vm.heads, vm.width}, vm.view.dtype);
  auto [db, ds, dkp, dvp] = backward(dout, dlse, qm, km, vm, VITKERN_COLLECT, as_map(dq, 1, kOp), as_map(dk, 1, kOp),
                                     as_map(dv, 1, kOp), need);
  const auto wanted = [&](int64_t bit, Tensor& t) { return need & bit ? OptTensor(t) : OptTensor(); };
  return {wanted(kNeedQ, dq), wanted(kNeedK, dk), wanted(kNeedV, dv), db, ds, dkp, dvp};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> window_attention_qkvpacked_bwd(
    OptTensor dout, OptTensor dlse, Tensor /*lse*/, Tensor qkv, VITKERN_OPTIONS, int64_t need) {
  const Map qm = packed_map(qkv, 0, kOp);
  const int64_t packed = need & 1;
  need = (need >> 1) << 3;
  Tensor dqkv = new_map(qm.lengths, {qm.batch, 3, qm.heads, qm.width}, qm.view.dtype);
  auto [db, ds, dkp, dvp] =
      backward(dout, dlse, qm, packed_map(qkv, 1, kOp), packed_map(qkv, 2, kOp), VITKERN_COLLECT,
               packed_map(dqkv, 0, kOp), packed_map(dqkv, 1, kOp), packed_map(dqkv, 2, kOp), need);
  return {packed ? OptTensor(dqkv) : OptTensor(), db, ds, dkp, dvp};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
  m.impl("window_attention_qkvpacked_fwd", TORCH_BOX(&window_attention_qkvpacked_fwd));
  m.impl("window_attention_qkvpacked", TORCH_BOX(&window_attention_qkvpacked_fwd));
  m.impl("window_attention_qkvpacked_bwd", TORCH_BOX(&window_attention_qkvpacked_bwd));
}

}  // namespace vitkern
