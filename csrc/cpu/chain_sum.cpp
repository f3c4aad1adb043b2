// chain_sum on the CPU: sequences, heads and slices of columns side by side. Its backward is Python code around the forward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "fields.h"
#include "kernels.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "chain_sum";

template <typename Acc>
const ChainKernels& chosen() {
  if constexpr (sizeof(Acc) == 8) return kernels().chain_f64;
  else return kernels().chain_f32;
}

// The problem of a call, and the tensors that it points into.
struct Call {
  ChainProblem p{};
  int64_t sequences;
  Dtype acc;
  std::vector<Tensor> kept;

  Call(const Tensor& a, const Tensor& b, const Tensor& c, const OptTensor& link, const OptTensor& state, const OptTensor& order,
       const OptTensor& bounds, bool columns, bool reverse, bool strict, int64_t block) {
    p.a = field_of(a, false, true, kOp);
    p.b = field_of(b, false, true, kOp);
    p.c = field_of(c, false, true, kOp);
    p.batch = a.size(0);
    p.tokens = int32_t(a.size(1));
    p.heads = int32_t(a.size(2));
    p.depth = int32_t(a.size(3));
    p.width = int32_t(c.size(3));
    for (const Tensor* t : {&b, &c})
      check(t->size(0) == p.batch && t->size(1) == p.tokens && t->size(2) == p.heads, kOp, "b and c must have the tokens and heads of a");
    check(b.size(3) == p.depth && p.depth >= 1 && p.width >= 1 && p.depth <= 1024 && p.width <= 1024, kOp, "b must have the width of a");
    check(block >= 0, kOp, "block must not be negative");
    p.block = int32_t(std::min<int64_t>(block, p.tokens));
    p.reverse = reverse;
    p.strict = strict;
    p.decay = Decay::none;
    if (link) set_link(*link, columns);
    p.order = int32_of(order, p.tokens);
    p.bounds = int32_of(bounds, -1);
    std::vector<uint8_t> seen(size_t(p.order ? p.tokens : 0), 0);
    for (size_t n = 0; n < seen.size(); ++n) {
      const int32_t at = p.order[n];
      check(uint32_t(at) < uint32_t(p.tokens) && !seen[size_t(at)], kOp, "order must be a permutation of the tokens");
      seen[size_t(at)] = 1;
    }
    sequences = bounds ? bounds->size(0) - 1 : p.batch;
    if (bounds) {
      p.packed = true;
      bool inside = p.batch == 1 && p.bounds[0] == 0 && p.bounds[sequences] == p.tokens;
      for (int64_t w = 0; w < sequences; ++w) inside &= p.bounds[w] <= p.bounds[w + 1];
      check(inside, kOp, "cu_seqlens must ascend from 0 to the number of tokens");
    }
    acc = wider(p.a.dtype, p.c.dtype);
    p.first = state_of(state);
  }

  // A state or its gradient, [S, H, F, C] in the dtype of the sums.
  const void* state_of(const OptTensor& t) {
    if (!t) return nullptr;
    check(t->dim() == 4 && t->size(0) == sequences && t->size(1) == p.heads && t->size(2) == p.depth && t->size(3) == p.width &&
              dtype_of(*t, kOp) == acc,
          kOp, "state must be [S, H, F, C], float32 (float64 for float64)");
    kept.push_back(torch::stable::contiguous(*t));
    return kept.back().const_data_ptr();
  }

 private:
  void set_link(const Tensor& link, bool columns) {
    p.link = field_of(link, false, true, kOp);
    const int64_t own = link.size(3);
    check(link.size(0) == p.batch && link.size(1) == p.tokens && link.size(2) == p.heads && (own == 1 || own == (columns ? p.width : p.depth)),
          kOp, "log_decay must have the tokens and heads of a, and one rate or one for each row (column) of the state");
    p.decay = own == 1 ? Decay::shared : (columns ? Decay::columns : Decay::rows);
  }
  static const int32_t* int32_of(const OptTensor& t, int64_t size) {
    if (!t) return nullptr;
    check(t->scalar_type() == torch::headeronly::ScalarType::Int && t->dim() == 1 && t->is_contiguous() &&
              (size < 0 ? t->size(0) >= 1 : t->size(0) == size),
          kOp, "order and cu_seqlens must be contiguous int32 [N] and [S + 1]");
    return static_cast<const int32_t*>(t->const_data_ptr());
  }
};

// The slices of a head are shared out only where there are fewer heads than threads: each share reads a and b again.
template <typename Acc>
void forward(const ChainProblem& p, int64_t sequences) {
  const ChainKernels& k = chosen<Acc>();
  const int64_t lanes = kernels().lanes * 4 / int64_t(sizeof(Acc)), slices = (p.width + lanes - 1) / lanes, units = sequences * p.heads;
  const int64_t wanted = std::clamp<int64_t>(torch::stable::get_num_threads() / std::max<int64_t>(units, 1), 1, slices);
  const int64_t each = (slices + wanted - 1) / wanted, parts = (slices + each - 1) / each;
  torch::stable::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(k.scratch_bytes(p, int32_t(each)));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t unit = t / parts, first = t % parts * each;
      k.forward(p, unit / p.heads, int32_t(unit % p.heads), int32_t(first), int32_t(std::min(each, slices - first)), scratch.data());
    }
  });
}
template <typename Acc>
void links(const ChainProblem& p, int64_t sequences) {
  const ChainKernels& k = chosen<Acc>();
  torch::stable::parallel_for(0, sequences * p.heads, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(k.links_bytes(p));
    for (int64_t t = begin; t < end; ++t) k.links(p, t / p.heads, int32_t(t % p.heads), scratch.data());
  });
}

std::tuple<Tensor, Tensor> chain_sum_fwd(Tensor a, Tensor b, Tensor c, OptTensor link, OptTensor state, OptTensor order, OptTensor bounds,
                                         bool columns, bool reverse, bool strict, int64_t block, std::string /*gpu*/) {
  Call call(a, b, c, link, state, order, bounds, columns, reverse, strict, block);
  ChainProblem& p = call.p;
  Tensor out = new_tensor({p.batch, p.tokens, p.heads, p.width}, call.acc);
  Tensor last = new_tensor({call.sequences, p.heads, p.depth, p.width}, call.acc);
  p.out = const_cast<void*>(out.const_data_ptr());
  p.last = const_cast<void*>(last.const_data_ptr());
  call.acc == Dtype::f64 ? forward<double>(p, call.sequences) : forward<float>(p, call.sequences);
  return {out, last};
}

Tensor chain_links(Tensor dout, Tensor a, Tensor b, Tensor c, Tensor link, OptTensor state, OptTensor dlast, OptTensor order, OptTensor bounds,
                   bool columns, bool reverse, int64_t block, std::string /*gpu*/) {
  Call call(a, b, c, link, state, order, bounds, columns, reverse, false, block);
  ChainProblem& p = call.p;
  p.dout = field_of(dout, false, true, kOp);
  for (int64_t axis = 0; axis < 4; ++axis) check(dout.size(axis) == c.size(axis), kOp, "dout must have the shape of c");
  p.dlast = call.state_of(dlast);
  Tensor found = new_tensor({p.batch, p.tokens, p.heads, link.size(3)}, call.acc);
  p.dlink = const_cast<void*>(found.const_data_ptr());
  if (found.numel()) std::memset(p.dlink, 0, size_t(found.numel() * size_of(call.acc)));
  call.acc == Dtype::f64 ? links<double>(p, call.sequences) : links<float>(p, call.sequences);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("chain_sum_fwd", TORCH_BOX(&chain_sum_fwd));
  m.impl("chain_sum", TORCH_BOX(&chain_sum_fwd));
  m.impl("chain_links", TORCH_BOX(&chain_links));
}

}  // namespace vitkern
