// depthwise_value on the CPU: samples, bands of rows and blocks of channels side by side.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "fields.h"
#include "kernels.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "depthwise_value";
constexpr int64_t kBand = 16;    // rows of one piece of work
constexpr int64_t kChunks = 64;  // of the sums of a weight's gradient, whatever the number of threads

// Heads that lie side by side are one.
bool joined(const Tensor& t) { return t.size(2) == 1 || (t.stride(3) == 1 && t.stride(2) == t.size(3)); }

struct Call {
  DepthwiseProblem p{};
  const DepthwiseKernels* kernels;
  Dtype acc;
  int64_t batch, bands, blocks, count;  // count: channels of the weight
  std::vector<char> weight, bias;       // Acc, as the kernels read them

  // `maps` are those of the call; the first has the values that the kernel slides over.
  Call(const std::vector<const Tensor*>& maps, const Tensor& kernel, const std::vector<int64_t>& grid) {
    const Tensor& v = *maps[0];
    check(v.dim() == 4 && grid.size() == 2 && v.size(1) == grid[0] * grid[1], kOp, "v must be [B, N, H, D] of a map of N cells");
    const bool flat = std::all_of(maps.begin(), maps.end(), [](const Tensor* t) { return joined(*t); });
    const int64_t heads = v.size(2), width = v.size(3);
    count = kernel.size(0);
    check(kernel.dim() == 4 && kernel.size(1) == 1 && (count == width || count == heads * width) && kernel.size(2) % 2 && kernel.size(3) % 2, kOp,
          "weight must be [H D or D, 1, kh, kw] with odd sides");
    acc = wider(dtype_of(v, kOp), dtype_of(v, kOp));
    kernels = acc == Dtype::f64 ? &vitkern::kernels().depthwise_f64 : &vitkern::kernels().depthwise_f32;
    batch = v.size(0);
    p.heads = int32_t(flat ? 1 : heads);
    p.width = int32_t(flat ? heads * width : width);
    p.padded = (p.width + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
    p.pitch = int64_t(p.heads) * p.padded;
    p.rows = int32_t(grid[0]), p.columns = int32_t(grid[1]);
    p.tall = int32_t(kernel.size(2)), p.wide = int32_t(kernel.size(3));
    bands = (p.rows + kBand - 1) / kBand;
    blocks = p.padded / kChannelBlock;
  }
  int64_t taps() const { return int64_t(p.tall) * p.wide; }
  // Where a channel of all stands among those of the kernels, and among those of the weight.
  int64_t place(int64_t channel) const { return channel / p.width * p.padded + channel % p.width; }
  int64_t channels() const { return int64_t(p.heads) * p.width; }

  // The kernel, `turned` for the gradient of the values.
  template <typename Acc>
  void read(const Tensor& kernel, const OptTensor& added, bool turned) {
    weight.assign(size_t(taps() * p.pitch) * sizeof(Acc), 0);
    Acc* const to = reinterpret_cast<Acc*>(weight.data());
    const Dtype dtype = dtype_of(kernel, kOp);
    for (int64_t c = 0; c < channels(); ++c)
      for (int64_t t = 0; t < taps(); ++t) {
        const int64_t tap = turned ? taps() - 1 - t : t;
        const int64_t at = c % count * kernel.stride(0) + tap / p.wide * kernel.stride(2) + tap % p.wide * kernel.stride(3);
        to[t * p.pitch + place(c)] = scalar<Acc>(kernel.const_data_ptr(), at, dtype);
      }
    p.weight = to;
    if (!added) return;
    check(added->dim() == 1 && added->size(0) == count, kOp, "bias must have the first axis of weight");
    bias.assign(size_t(p.pitch) * sizeof(Acc), 0);
    Acc* const offset = reinterpret_cast<Acc*>(bias.data());
    for (int64_t c = 0; c < channels(); ++c)
      offset[place(c)] = scalar<Acc>(added->const_data_ptr(), c % count * added->stride(0), dtype_of(*added, kOp));
    p.bias = offset;
  }
  // body(unit, head, first channel, scratch): units behind each other for each, pieces side by side.
  template <typename Body>
  void over(int64_t units, Body body) const {
    const int64_t pieces = p.heads * blocks, cells = std::max<int64_t>(1, std::min<int64_t>(p.rows, kBand) * p.columns);
    torch::stable::parallel_for(0, units * pieces, std::max<int64_t>(1, 512 / cells), [&](int64_t begin, int64_t end) {
      Scratch scratch(kernels->scratch_bytes(p));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t piece = t % pieces;
        body(t / pieces, int32_t(piece / blocks), int32_t(piece % blocks * kChannelBlock), scratch.data());
      }
    });
  }
  int32_t top(int64_t unit) const { return int32_t(unit % bands * kBand); }
  int32_t bottom(int64_t unit) const { return int32_t(std::min<int64_t>(p.rows, unit % bands * kBand + kBand)); }

  // out of the shape of `like`, with the kernel as it is or turned.
  Tensor slid(const Tensor& like, const Tensor& kernel, const OptTensor& added, bool turned) {
    Tensor out = new_tensor({batch, like.size(1), like.size(2), like.size(3)}, dtype_of(like, kOp));
    p.v = field_of(like, false, true, kOp);
    p.out = field_of(out, false, true, kOp);
    if (acc == Dtype::f64) read<double>(kernel, added, turned);
    else read<float>(kernel, added, turned);
    over(batch * bands, [&](int64_t unit, int32_t head, int32_t first, void* scratch) {
      kernels->forward(p, unit / bands, head, first, top(unit), bottom(unit), scratch);
    });
    return out;
  }
};

// Sums of dout and v: of each chunk of bands in Acc, of the chunks in double.
template <typename Acc>
std::tuple<OptTensor, OptTensor> sums(const Call& c, const Tensor& kernel, const OptTensor& added, bool of_weight, bool of_bias) {
  const int64_t units = c.batch * c.bands, chunks = std::min(units, kChunks), size = (c.taps() + 1) * c.p.pitch;
  std::vector<Acc> parts(size_t(chunks * size));
  c.over(chunks, [&](int64_t chunk, int32_t head, int32_t first, void* scratch) {
    for (int64_t unit = chunk * units / chunks; unit < (chunk + 1) * units / chunks; ++unit)
      c.kernels->weights(c.p, unit / c.bands, head, first, c.top(unit), c.bottom(unit), parts.data() + chunk * size, scratch);
  });
  std::vector<double> all(size_t(size), 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) all[size_t(i)] += double(parts[size_t(chunk * size + i)]);
  const auto total = [&](int64_t tap, int64_t channel) {
    double sum = 0;
    for (int64_t other = channel; other < c.channels(); other += c.count) sum += all[size_t(tap * c.p.pitch + c.place(other))];
    return sum;
  };
  OptTensor dweight, dbias;
  if (of_weight) {
    const Dtype dtype = dtype_of(kernel, kOp);
    dweight = new_tensor({c.count, 1, c.p.tall, c.p.wide}, dtype);
    for (int64_t channel = 0; channel < c.count; ++channel)
      for (int64_t tap = 0; tap < c.taps(); ++tap)
        set_scalar<double>(dweight->mutable_data_ptr(), channel * c.taps() + tap, dtype, total(tap, channel));
  }
  if (of_bias) {
    const Dtype dtype = dtype_of(*added, kOp);
    dbias = new_tensor({c.count}, dtype);
    for (int64_t channel = 0; channel < c.count; ++channel) set_scalar<double>(dbias->mutable_data_ptr(), channel, dtype, total(c.taps(), channel));
  }
  return {dweight, dbias};
}

Tensor depthwise_value_fwd(Tensor v, Tensor weight, OptTensor bias, std::vector<int64_t> grid, std::string /*gpu*/) {
  return Call({&v}, weight, grid).slid(v, weight, bias, false);
}

std::tuple<OptTensor, OptTensor, OptTensor> depthwise_value_bwd(OptTensor dout, Tensor v, Tensor weight, OptTensor bias, std::vector<int64_t> grid,
                                                                std::string /*gpu*/, int64_t need) {
  check(bool(dout) && dout->dim() == 4, kOp, "the output needs a gradient [B, N, H, D]");
  for (int64_t axis = 0; axis < 4; ++axis) check(dout->size(axis) == v.size(axis), kOp, "the gradient of the output must have its shape");
  OptTensor dv, dweight, dbias;
  if (need & 1) dv = Call({&*dout}, weight, grid).slid(*dout, weight, std::nullopt, true);
  if (need & 6) {
    Call c({&v, &*dout}, weight, grid);
    c.p.v = field_of(v, false, true, kOp);
    c.p.dout = field_of(*dout, false, true, kOp);
    const bool of_bias = (need & 4) && bias;
    std::tie(dweight, dbias) = c.acc == Dtype::f64 ? sums<double>(c, weight, bias, need & 2, of_bias) : sums<float>(c, weight, bias, need & 2, of_bias);
  }
  return {dv, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("depthwise_value_fwd", TORCH_BOX(&depthwise_value_fwd));
  m.impl("depthwise_value", TORCH_BOX(&depthwise_value_fwd));
  m.impl("depthwise_value_bwd", TORCH_BOX(&depthwise_value_bwd));
}

}  // namespace vitkern
