// selective_scan on the CPU: blocks of channels side by side, every route of a block in turn.
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
constexpr const char* kOp = "selective_scan";

ScanView view_of(const Tensor& t) {
  const auto s = t.strides();
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  const Dtype dtype = dtype_of(t, kOp);
  if (t.dim() == 3) return {data, dtype, s[0], s[1], 0, 0, s[2]};
  if (t.dim() == 4) return {data, dtype, s[0], s[1], t.size(2) == 1 ? 0 : s[2], 0, s[3]};
  return {data, dtype, s[0], s[1], s[2], s[3], s[4]};
}

template <typename Acc>
const ScanKernels& chosen() {
  if constexpr (sizeof(Acc) == 8) return kernels().scan_f64;
  else return kernels().scan_f32;
}

// The arrays of one call; channels stand block by block, as the kernels want them.
template <typename Acc>
struct Run {
  ScanProblem p{};
  const ScanKernels& k = chosen<Acc>();
  std::vector<int32_t> lane;  // of every channel
  std::vector<int32_t> whole;
  std::vector<Acc> a, d, bias, weight, first, last;

  Run(const Tensor& u, const Tensor& delta, const Tensor& rate, const Tensor& b, const Tensor& c, const OptTensor& skip,
      const OptTensor& z, const OptTensor& shift, const OptTensor& start, const OptTensor& factor, const Tensor& routes, const OptTensor& bounds,
      bool softplus, const std::string& reduce) {
    using torch::headeronly::ScalarType;
    check(u.dim() == 4 && delta.dim() == 4 && rate.dim() == 3 && b.dim() == 5 && c.dim() == 5 && routes.dim() == 2, kOp,
          "u must be [N, L, 1 or R, C], delta [N, L, R, C], a [R, C, S], b and c [N, L, R, G, S], routes [R, L]");
    p.batch = u.size(0);
    p.length = int32_t(u.size(1));
    p.channels = int32_t(u.size(3));
    p.count = int32_t(rate.size(0));
    p.states = int32_t(rate.size(2));
    p.groups = int32_t(b.size(3));
    for (const Tensor* t : {&delta, &b, &c})
      check(t->size(0) == p.batch && t->size(1) == p.length && t->size(2) == p.count, kOp, "delta, b and c must have the tokens and routes");
    p.own_u = u.size(2) > 1;
    p.own_z = z && z->size(2) > 1;
    check((!p.own_u || u.size(2) == p.count) && (!p.own_z || z->size(2) == p.count), kOp, "u and z must have one route or those of a");
    if (factor) {
      p.rank = int32_t(factor->size(2));
      check(factor->size(0) == p.count && factor->size(1) == p.channels && p.rank >= 1, kOp, "delta_weight must be [R, C, K]");
    }
    check(delta.size(3) == (factor ? p.rank : p.channels) && rate.size(1) == p.channels && b.size(4) == p.states && c.size(4) == p.states &&
              c.size(3) == p.groups && p.groups >= 1 && p.channels % p.groups == 0 && p.states >= 1 && p.states <= 256,
          kOp, "channels, groups and states must fit each other");
    check(routes.scalar_type() == ScalarType::Int && routes.is_contiguous() && routes.size(0) == p.count && routes.size(1) == p.length,
          kOp, "routes must be contiguous int32 [R, L]");
    p.routes = static_cast<const int32_t*>(routes.const_data_ptr());
    std::vector<uint8_t> seen;
    for (int32_t r = 0; r < p.count; ++r) {
      seen.assign(size_t(p.length), 0);
      bool once = true;
      for (int32_t l = 0; l < p.length && once; ++l) {
        const int32_t at = p.routes[int64_t(r) * p.length + l];
        once = uint32_t(at) < uint32_t(p.length) && !seen[size_t(at)]++;
      }
      check(once, kOp, "a route must be a permutation of the tokens");
    }
    whole = {0, p.length};
    p.bounds = whole.data();
    p.windows = 1;
    if (bounds) {
      check(bounds->scalar_type() == ScalarType::Int && bounds->dim() == 1 && bounds->is_contiguous() && bounds->size(0) >= 1 &&
                p.batch <= 1,
            kOp, "cu_seqlens must be contiguous int32 [W + 1]");
      p.bounds = static_cast<const int32_t*>(bounds->const_data_ptr());
      p.windows = int32_t(bounds->size(0) - 1);
      bool inside = p.bounds[0] == 0 && p.bounds[p.windows] == p.length;
      for (int32_t w = 0; w < p.windows; ++w) inside &= p.bounds[w] <= p.bounds[w + 1];
      check(inside, kOp, "cu_seqlens must ascend from 0 to the number of tokens");
    }
    p.softplus = softplus;
    p.stack = reduce == "stack";
    check(p.stack || reduce == "sum" || reduce == "mean", kOp, "reduce must be 'sum', 'mean' or 'stack'");
    p.factor = reduce == "mean" ? 1.0 / p.count : 1.0;
    p.u = view_of(u);
    p.delta = view_of(delta);
    p.b = view_of(b);
    p.c = view_of(c);
    if (z) p.z = view_of(*z);
    const int32_t width = k.width(), share = p.channels / p.groups;
    p.group_blocks = (share + width - 1) / width;
    p.pitch = int64_t(p.groups) * p.group_blocks * width;
    for (int32_t ch = 0; ch < p.channels; ++ch) lane.push_back(ch / share * p.group_blocks * width + ch % share);
    a = across(rate);
    p.a = a.data();
    if (skip) p.d = (d = across(*skip)).data();
    if (shift) p.bias = (bias = across(*shift)).data();
    if (factor) p.weight = (weight = across(*factor)).data();
    if (start) p.first = (first = across(*start)).data();
  }

  // [..., C, S] as [..., S][pitch], and [R, C] as [R][pitch].
  std::vector<Acc> across(const Tensor& given) const {
    const Tensor t = torch::stable::contiguous(given);
    const int64_t states = t.dim() == 2 ? 1 : t.size(t.dim() - 1), rows = t.numel() / std::max<int64_t>(1, p.channels * states);
    std::vector<Acc> laid(size_t(rows * states * p.pitch));
    const Dtype dtype = dtype_of(t, kOp);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t ch = 0; ch < p.channels; ++ch)
        for (int64_t s = 0; s < states; ++s)
          laid[size_t((i * states + s) * p.pitch + lane[size_t(ch)])] = scalar<Acc>(t.const_data_ptr(), (i * p.channels + ch) * states + s, dtype);
    return laid;
  }
  // The way back, the sum of `parts` arrays.
  Tensor together(const std::vector<Acc>& laid, const std::vector<int64_t>& sizes, int64_t parts, int64_t states, Dtype dtype) const {
    Tensor t = new_tensor(sizes, dtype);
    const int64_t rows = t.numel() / std::max<int64_t>(1, p.channels * states), step = rows * states * p.pitch;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t ch = 0; ch < p.channels; ++ch)
        for (int64_t s = 0; s < states; ++s) {
          Acc sum = 0;
          for (int64_t n = 0; n < parts; ++n) sum += laid[size_t(n * step + (i * states + s) * p.pitch + lane[size_t(ch)])];
          set_scalar<Acc>(const_cast<void*>(t.const_data_ptr()), (i * p.channels + ch) * states + s, dtype, sum);
        }
    return t;
  }
  int64_t state_size() const { return p.batch * p.count * p.windows * p.states * p.pitch; }
  std::vector<int64_t> state_sizes() const { return {p.batch, p.count, p.windows, p.channels, p.states}; }

  void over_blocks(void (*kernel)(const ScanProblem&, int64_t, int32_t, void*)) const {
    const int64_t blocks = int64_t(p.groups) * p.group_blocks, bytes = k.scratch_bytes(p);
    torch::stable::parallel_for(0, p.batch * blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes, false);
      for (int64_t t = begin; t < end; ++t) kernel(p, t / blocks, int32_t(t % blocks), scratch.data());
    });
  }
};

std::tuple<Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, OptTensor d, OptTensor z,
                                              OptTensor bias, OptTensor first, OptTensor weight, Tensor routes, OptTensor bounds,
                                              bool softplus, std::string reduce, std::string /*gpu*/) {
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    Run<Acc> r(u, delta, a, b, c, d, z, bias, first, weight, routes, bounds, softplus, reduce);
    ScanProblem& p = r.p;
    Tensor out = p.stack ? new_tensor({p.batch, p.length, p.count, p.channels}, p.u.dtype) : new_tensor({p.batch, p.length, p.channels}, p.u.dtype);
    p.out = view_of(out);
    r.last.resize(size_t(r.state_size()));
    p.last = r.last.data();
    r.over_blocks(r.k.forward);
    return std::tuple<Tensor, Tensor>(r.together(r.last, r.state_sizes(), 1, p.states, sizeof(Acc) == 8 ? Dtype::f64 : Dtype::f32), out);
  };
  return dtype_of(u, kOp) == Dtype::f64 ? run(double()) : run(float());
}

// [N, L, R, G, S] from the part of each of a group's blocks, [N][G][blocks][L][R][S].
template <typename Acc>
Tensor block_sums(const ScanProblem& p, const std::vector<Acc>& parts, std::vector<int64_t> sizes, int64_t groups, int64_t blocks, int64_t states,
                  Dtype dtype) {
  Tensor t = new_tensor(sizes, dtype);
  void* data = const_cast<void*>(t.const_data_ptr());
  const int64_t row = int64_t(p.count) * states, block = p.length * row;
  torch::stable::parallel_for(0, p.batch * p.length, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0, at = i * row * groups; r < p.count; ++r)
        for (int64_t g = 0; g < groups; ++g) {
          const Acc* from = parts.data() + (i / p.length * groups + g) * blocks * block + i % p.length * row + r * states;
          for (int64_t s = 0; s < states; ++s, ++at) {
            Acc sum = 0;
            for (int64_t n = 0; n < blocks; ++n) sum += from[n * block + s];
            set_scalar<Acc>(data, at, dtype, sum);
          }
        }
  });
  return t;
}

using Gradients = std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor>;
Gradients selective_scan_bwd(OptTensor dstate, OptTensor dout, Tensor /*out*/, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c,
                             OptTensor d, OptTensor z, OptTensor bias, OptTensor first, OptTensor weight, Tensor routes, OptTensor bounds,
                             bool softplus, std::string reduce, std::string /*gpu*/, int64_t need) {
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    Run<Acc> r(u, delta, a, b, c, d, z, bias, first, weight, routes, bounds, softplus, reduce);
    ScanProblem& p = r.p;
    OptTensor du, ddelta, da, db, dc, dd, dz, dbias, dfirst, dweight;
    if (need & 1) p.du = view_of(*(du = new_tensor({p.batch, p.length, u.size(2), p.channels}, p.u.dtype)));
    if (need & 2 && !weight) p.ddelta = view_of(*(ddelta = new_tensor({p.batch, p.length, p.count, p.channels}, p.delta.dtype)));
    if (need & 64 && z) p.dz = view_of(*(dz = new_tensor({p.batch, p.length, z->size(2), p.channels}, p.z.dtype)));
    if (!dout) {
      if (p.stack) dout = torch::stable::new_zeros(u, {p.batch, p.length, p.count, p.channels});
      else dout = torch::stable::new_zeros(u, {p.batch, p.length, p.channels});
    }
    p.dout = view_of(*dout);
    const int64_t rows = p.batch * p.count * p.pitch, blocks = int64_t(p.groups) * p.group_blocks;
    const size_t lanes = size_t(rows);
    std::vector<Acc> factor(lanes * size_t(p.rank)), low(size_t(p.batch * blocks * p.length * p.count * p.rank));
    std::vector<Acc> rate(lanes * size_t(p.states)), skip(lanes), shift(lanes), begin(size_t(r.state_size())), end;
    std::vector<Acc> gain(size_t(p.batch * blocks * p.length * p.count * p.states)), read(gain.size());
    p.da = rate.data();
    p.dd = skip.data();
    p.dbias = shift.data();
    p.dfirst = begin.data();
    p.db = gain.data();
    p.dc = read.data();
    p.dlow = low.data();
    p.dweight = factor.data();
    if (dstate) p.dlast = (end = r.across(*dstate)).data();
    r.over_blocks(r.k.backward);
    const std::vector<int64_t> of_states = {p.batch, p.length, p.count, p.groups, p.states};
    if (need & 2 && weight) ddelta = block_sums<Acc>(p, low, {p.batch, p.length, p.count, p.rank}, 1, blocks, p.rank, p.delta.dtype);
    if (need & 4) da = r.together(rate, {p.count, p.channels, p.states}, p.batch, p.states, dtype_of(a, kOp));
    if (need & 8) db = block_sums<Acc>(p, gain, of_states, p.groups, p.group_blocks, p.states, p.b.dtype);
    if (need & 16) dc = block_sums<Acc>(p, read, of_states, p.groups, p.group_blocks, p.states, p.c.dtype);
    if (need & 32 && d) dd = r.together(skip, {p.count, p.channels}, p.batch, 1, dtype_of(*d, kOp));
    if (need & 128 && bias) dbias = r.together(shift, {p.count, p.channels}, p.batch, 1, dtype_of(*bias, kOp));
    if (need & 256 && first) dfirst = r.together(begin, r.state_sizes(), 1, p.states, dtype_of(*first, kOp));
    if (need & 512 && weight) dweight = r.together(factor, {p.count, p.channels, p.rank}, p.batch, p.rank, dtype_of(*weight, kOp));
    return Gradients(du, ddelta, da, db, dc, dd, dz, dbias, dfirst, dweight);
  };
  return dtype_of(u, kOp) == Dtype::f64 ? run(double()) : run(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_bwd));
}

}  // namespace vitkern
