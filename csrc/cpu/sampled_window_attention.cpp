// sampled_window_attention on the CPU: tensors to plain pointers, windows to threads, partial sums to gradients.
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
constexpr const char* kOp = "sampled_window_attention";
constexpr int64_t kTasks = 32, kSumBytes = int64_t(64) << 20;  // of a backward: about as many tasks; their sums of a bias

// Bits of `need`, and the order of the gradients.
enum Need { kNeedQ = 1, kNeedK = 2, kNeedV = 4, kNeedCoords = 8, kNeedCoordsV = 16, kNeedOfWindow = 32, kNeedBias = 64 };

SampledPlaces places_of(const Tensor& t) {
  const auto s = t.strides();
  return {static_cast<const char*>(t.const_data_ptr()), dtype_of(t, kOp), s[0], s[1], s[2], s[3], s[4], s[5]};
}
SampledBias bias_of(const Tensor& t) {
  const auto s = t.strides();
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), s[0], s[1], s[2], s[3], s[4]};
}
std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

struct Run {
  SampledProblem p{};
  Dtype dtype;
  std::vector<char> bias;

  Run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& coords, const OptTensor& coords_v, const OptTensor& of_window,
      const OptTensor& given, const OptTensor& index, const std::vector<int64_t>& window, double scale, bool mask) {
    check(q.dim() == 5 && k.dim() == 5 && v.dim() == 5 && coords.dim() == 6 && window.size() == 2, kOp,
          "q, k and v must be [B, H, W, heads, D], and coords [B, nWy, nWx, K, G, 2]");
    const Map mq = as_map(q, 1, kOp), mk = as_map(k, 1, kOp), mv = as_map(v, 1, kOp);
    check(mk.heads > 0 && mq.heads % mk.heads == 0 && mv.heads == mk.heads && mk.width == mq.width && mv.lengths == mk.lengths &&
              mk.batch == mq.batch && mv.batch == mq.batch,
          kOp, "q, k and v do not fit together");
    dtype = mq.view.dtype;
    p.batch = mq.batch;
    p.heads = int32_t(mq.heads);
    p.kv_heads = int32_t(mk.heads);
    p.d = int32_t(mq.width);
    p.dv = int32_t(mv.width);
    for (const Map* m : {&mq, &mk})
      for (int64_t length : m->lengths) check(length >= 1 && length < (int64_t(1) << 24), kOp, "a map must have sides below 2^24");
    p.height = int32_t(mq.lengths[0]);
    p.width = int32_t(mq.lengths[1]);
    p.key_height = int32_t(mk.lengths[0]);
    p.key_width = int32_t(mk.lengths[1]);
    p.q = mq.view;
    p.k = mk.view;
    p.v = mv.view;
    int64_t n = 1;
    for (size_t a = 0; a < 2; ++a) {
      const int64_t count = (mq.lengths[a] + window[a] - 1) / window[a];
      check(window[a] >= 1 && window[a] < (1 << 24) && coords.size(int64_t(a) + 1) == count, kOp, "coords must have the windows of q");
      p.window[a] = int32_t(window[a]);
      p.windows[a] = int32_t(count);
      n *= window[a];
    }
    const int64_t samples = coords.size(3), groups = coords.size(4);
    check(n < (1 << 24) && samples >= 1 && samples < (1 << 24), kOp, "a window must have fewer than 2^24 queries, and 1 to 2^24 samples");
    check(coords.size(0) == p.batch && coords.size(5) == 2 && (groups == 1 || groups % p.heads == 0), kOp,
          "coords must have the batch of q, groups of its heads, and x and y");
    p.n = int32_t(n);
    p.samples = int32_t(samples);
    p.groups = int32_t(groups);
    p.parts = groups == 1 ? 1 : int32_t(groups / p.heads);
    check(p.d % p.parts == 0 && p.dv % p.parts == 0, kOp, "the groups of a head must divide its channels");
    const int64_t lanes = wide() ? kernels().lanes / 2 : kernels().lanes, step = n <= kSampledRows ? lanes : kSampledRows;
    p.padded = int32_t((n + step - 1) / step * step);
    p.mask = mask;
    p.scale = scale;
    p.coords = places_of(coords);
    if (coords_v) {
      check(sizes_of(*coords_v) == sizes_of(coords), kOp, "coords_v must have the shape of coords");
      p.coords_v = places_of(*coords_v);
    }
    if (of_window) {
      check(sizes_of(*of_window) == std::vector<int64_t>{p.batch, windows(), p.heads, n, samples}, kOp,
            "a bias of every window must be [B, nW, H, N, K]");
      p.of_window = bias_of(*of_window);
    }
    if (given) wide() ? set_bias<double>(*given, index) : set_bias<float>(*given, index);
  }

  bool wide() const { return dtype == Dtype::f64; }
  int64_t windows() const { return int64_t(p.windows[0]) * p.windows[1]; }
  const SampledKernels& chosen() const { return wide() ? kernels().sampled_f64 : kernels().sampled_f32; }
  template <typename Acc>
  Acc* block(std::vector<char>& keep, int64_t count) const {
    keep.assign(size_t(count) * sizeof(Acc), 0);
    return reinterpret_cast<Acc*>(keep.data());
  }

  // The bias of every window as [H][K][padded]: a dense one [H, N, K], or a table [R, H] by its index [N, K].
  template <typename Acc>
  void set_bias(const Tensor& given, const OptTensor& index) {
    Acc* out = block<Acc>(bias, int64_t(p.heads) * p.samples * p.padded);
    p.bias = out;
    const auto s = given.strides();
    if (index) {
      check(index->dim() == 2 && index->size(0) == p.n && index->size(1) == p.samples && given.size(1) == p.heads, kOp,
            "bias.index must be [N, K], its table [R, H]");
      check_index(*index, given.size(0), kOp);
    } else {
      check(sizes_of(given) == std::vector<int64_t>{p.heads, p.n, p.samples}, kOp, "bias must be [H, N, K]");
    }
    const int32_t* entry = index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr;
    with_element(dtype_of(given, kOp), [&](auto element) {
      using T = decltype(element);
      const T* data = static_cast<const T*>(given.const_data_ptr());
      torch::stable::parallel_for(0, int64_t(p.heads) * p.samples, std::max<int64_t>(1, 65536 / p.n), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
          for (int64_t i = 0, h = r / p.samples, j = r % p.samples; i < p.n; ++i) {
            const int64_t at = entry ? entry[i * index->stride(0) + j * index->stride(1)] * s[0] + h * s[1] : h * s[0] + i * s[1] + j * s[2];
            out[r * p.padded + i] = widened<Acc>(data[at]);
          }
      });
    });
  }

  // The sum of `count` parts [H][K][padded] as the gradient of a bias or table.
  template <typename Acc>
  Tensor bias_gradient(const Tensor& given, const OptTensor& index, Acc* sum, int64_t count) const {
    const int64_t size = int64_t(p.heads) * p.samples * p.padded;
    torch::stable::parallel_for(0, size, 65536, [&](int64_t first, int64_t last) {
      for (int64_t c = 1; c < count; ++c)
        for (int64_t i = first; i < last; ++i) sum[i] += sum[c * size + i];
    });
    const Dtype type = dtype_of(given, kOp);
    Tensor grad = new_tensor(sizes_of(given), type);
    void* to = grad.mutable_data_ptr();
    const int64_t rows = given.size(0);
    const int32_t* entry = index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr;
    torch::stable::parallel_for(0, p.heads, 1, [&](int64_t first, int64_t last) {
      std::vector<Acc> table(size_t(index ? rows : 0));
      for (int64_t h = first; h < last; ++h) {
        std::fill(table.begin(), table.end(), Acc(0));
        for (int64_t i = 0; i < p.n; ++i)
          for (int64_t j = 0; j < p.samples; ++j) {
            const Acc x = sum[(h * p.samples + j) * p.padded + i];
            if (entry) table[size_t(entry[i * index->stride(0) + j * index->stride(1)])] += x;
            else set_scalar<Acc>(to, (h * p.n + i) * p.samples + j, type, x);
          }
        for (int64_t r = 0; r < int64_t(table.size()); ++r) set_scalar<Acc>(to, r * p.heads + h, type, table[size_t(r)]);
      }
    });
    return grad;
  }

  // The gradient of places from that of each head's, [B][nW][K][H][parts][2]: places that all heads share sum theirs in order.
  template <typename Acc>
  Tensor places_gradient(const Tensor& coords, const Acc* found) const {
    const Dtype type = dtype_of(coords, kOp);
    Tensor grad = new_tensor(sizes_of(coords), type);
    void* to = grad.mutable_data_ptr();
    const int64_t shared = p.groups == 1 ? p.heads : 1, rows = grad.numel() / 2;
    torch::stable::parallel_for(0, rows, 8192, [&](int64_t first, int64_t last) {
      for (int64_t i = 2 * first; i < 2 * last; ++i) {
        Acc sum = 0;
        for (int64_t h = 0; h < shared; ++h) sum += found[(i / 2 * shared + h) * 2 + i % 2];
        set_scalar<Acc>(to, i, type, sum);
      }
    });
    return grad;
  }

  // Runs the backward: parts of the bias's gradient to `dbias` (`count` of them), slices of dk and dv into their maps.
  template <typename Acc>
  int64_t backward(std::vector<char>* dbias) const {
    if (p.batch == 0) return 0;
    const SampledKernels& k = chosen();
    const bool of_k = p.dk.data, of_v = p.dv_map.data;
    const int64_t bias_size = dbias ? int64_t(p.heads) * p.samples * p.padded : 0;
    const int64_t most = dbias ? std::max<int64_t>(1, kSumBytes / (bias_size * int64_t(sizeof(Acc)))) : kTasks;
    const int64_t images = std::min({p.batch, kTasks, most}), slices = p.batch * p.kv_heads;
    const int64_t chunks = std::clamp<int64_t>(kTasks / 2 / slices, 1, std::min(windows(), std::max<int64_t>(1, most / images)));
    const int64_t size_k = of_k ? k.slice(p, false) : 0, size_v = of_v ? k.slice(p, true) : 0, size = size_k + size_v;
    Acc* sums = dbias ? block<Acc>(*dbias, images * chunks * bias_size) : nullptr;
    std::vector<char> keep;
    Acc* apart = chunks > 1 ? block<Acc>(keep, slices * chunks * size) : nullptr;
    const int64_t bytes = k.scratch_bytes(p, true);
    const auto finish = [&](int64_t image, int64_t head, const Acc* from, void* scratch) {
      if (of_k) k.finish(p, false, image, int32_t(head), from, chunks, size, scratch);
      if (of_v) k.finish(p, true, image, int32_t(head), from + size_k, chunks, size, scratch);
    };
    torch::stable::parallel_for(0, images * p.kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes);
      std::vector<Acc> own(size_t(apart ? 0 : size));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t chunk = t % chunks, head = t / chunks % p.kv_heads, part = t / chunks / p.kv_heads;
        Acc* sum = sums ? sums + (part * chunks + chunk) * bias_size : nullptr;
        for (int64_t image = p.batch * part / images; image < p.batch * (part + 1) / images; ++image) {
          std::fill(own.begin(), own.end(), Acc(0));
          Acc* slice = apart ? apart + ((image * p.kv_heads + head) * chunks + chunk) * size : own.data();
          k.backward(p, image, int32_t(head), int32_t(windows() * chunk / chunks), int32_t(windows() * (chunk + 1) / chunks), sum,
                     of_k ? slice : nullptr, of_v ? slice + size_k : nullptr, scratch.data());
          if (!apart) finish(image, head, slice, scratch.data());
        }
      }
    });
    if (apart)
      torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(bytes, false);
        for (int64_t t = begin; t < end; ++t) finish(t / p.kv_heads, t % p.kv_heads, apart + t * chunks * size, scratch.data());
      });
    return images * chunks;
  }
};

Tensor sampled_window_attention(Tensor q, Tensor k, Tensor v, Tensor coords, OptTensor coords_v, OptTensor of_window, OptTensor bias,
                                OptTensor index, std::vector<int64_t> window, double scale, bool mask, std::string /*gpu*/) {
  Run r(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask);
  SampledProblem& p = r.p;
  Tensor out = new_tensor({p.batch, p.height, p.width, p.heads, p.dv}, r.dtype);
  p.out = as_map(out, 1, kOp).view;
  const int64_t units = p.batch * r.windows(), groups = std::min<int64_t>(units, 256);
  const int64_t blocks = std::clamp<int64_t>(64 / std::max<int64_t>(units, 1), 1, p.kv_heads);
  const SampledKernels& kernel = r.chosen();
  const int64_t bytes = kernel.scratch_bytes(p, false);
  torch::stable::parallel_for(0, groups * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t group = t / blocks, block = t % blocks;
      kernel.forward(p, units * group / groups, units * (group + 1) / groups, int32_t(p.kv_heads * block / blocks),
                     int32_t(p.kv_heads * (block + 1) / blocks), scratch.data());
    }
  });
  return out;
}

using Gradients = std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor>;

template <typename Acc>
void backward(Run& r, const Tensor& coords, const OptTensor& coords_v, const OptTensor& bias, const OptTensor& index, int64_t need,
              Gradients& grads) {
  SampledProblem& p = r.p;
  std::vector<char> places, places_v, sums;
  const int64_t count = p.batch * r.windows() * p.samples * p.heads * p.parts * 2;
  if (need & kNeedCoords) p.dcoords = r.block<Acc>(places, count);
  if (need & kNeedCoordsV && coords_v) p.dcoords_v = r.block<Acc>(places_v, count);
  const bool of_bias = need & kNeedBias && bias;
  const int64_t parts = r.backward<Acc>(of_bias ? &sums : nullptr);
  if (p.dcoords) std::get<3>(grads) = r.places_gradient<Acc>(coords, static_cast<const Acc*>(p.dcoords));
  if (p.dcoords_v) std::get<4>(grads) = r.places_gradient<Acc>(*coords_v, static_cast<const Acc*>(p.dcoords_v));
  if (of_bias) {
    if (!parts) sums.assign(size_t(p.heads) * size_t(p.samples) * size_t(p.padded) * sizeof(Acc), 0);
    std::get<6>(grads) = r.bias_gradient<Acc>(*bias, index, reinterpret_cast<Acc*>(sums.data()), parts);
  }
}

Gradients sampled_window_attention_bwd(OptTensor dout, Tensor q, Tensor k, Tensor v, Tensor coords, OptTensor coords_v, OptTensor of_window,
                                       OptTensor bias, OptTensor index, std::vector<int64_t> window, double scale, bool mask,
                                       std::string /*gpu*/, int64_t need) {
  check(dout.has_value(), kOp, "the gradient of out must be given");
  Run r(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask);
  SampledProblem& p = r.p;
  p.dout = as_map(*dout, 1, kOp).view;
  Gradients grads;
  const auto map = [&](OptTensor& grad, const Tensor& like) { return as_map(*(grad = new_tensor(sizes_of(like), r.dtype)), 1, kOp).view; };
  if (need & kNeedQ) p.dq = map(std::get<0>(grads), q);
  if (need & kNeedK) p.dk = map(std::get<1>(grads), k);
  if (need & kNeedV) p.dv_map = map(std::get<2>(grads), v);
  if (need & kNeedOfWindow && of_window) {
    std::get<5>(grads) = new_tensor(sizes_of(*of_window), p.of_window.dtype);
    p.dof_window = bias_of(*std::get<5>(grads));
  }
  r.wide() ? backward<double>(r, coords, coords_v, bias, index, need, grads) : backward<float>(r, coords, coords_v, bias, index, need, grads);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("sampled_window_attention_fwd", TORCH_BOX(&sampled_window_attention));
  m.impl("sampled_window_attention", TORCH_BOX(&sampled_window_attention));
  m.impl("sampled_window_attention_bwd", TORCH_BOX(&sampled_window_attention_bwd));
}

}  // namespace vitkern
