// The private torch ops of the CUDA kernels of linear attention: tensors to parameters, checks, registration.
//
// Shapes were checked in Python, where messages name arguments; the checks here are a second fence around what the
// kernels rely on.
#include "linear_attention.h"

#include "op.h"

namespace {

using namespace vitkern;

int32_t small(int64_t n) {
  STD_TORCH_CHECK(n >= 0 && n < (int64_t(1) << 30), "linear_attention: a size of 2^30 or more");
  return int32_t(n);
}

// A map [B, Wy, wy, Wx, wx, heads, channels], or without its last axes.
SequenceView view_of(const MaybeTensor& x, const Tensor& like, int64_t rank, ScalarType type) {
  SequenceView view{};
  if (!x) return view;
  STD_TORCH_CHECK(x->dim() == rank && x->scalar_type() == type, "linear_attention: a map of other axes or another dtype");
  for (int64_t i = 0; i < 5; ++i)
    STD_TORCH_CHECK(x->size(i) == like.size(i), "linear_attention: maps of other sides than those of q or k");
  STD_TORCH_CHECK(rank < 6 || x->size(5) == like.size(5), "linear_attention: heads that are not those of q or k");
  STD_TORCH_CHECK(rank < 7 || x->size(6) <= 1 || x->stride(6) == 1,
                  "linear_attention: the CUDA kernel needs a contiguous last dimension");
  view.data = x->data_ptr();
  view.vector = rank == 7 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int64_t i = 0; i < 6 && i < rank; ++i) {
    view.stride[i] = x->size(i) <= 1 ? 0 : x->stride(i);
    view.vector = view.vector && view.stride[i] % 8 == 0;
  }
  return view;
}

TokenAxis axis_of(const Tensor& x, const MaybeTensor& bounds, int64_t sequences) {
  const int32_t side = small(x.size(4));
  return {plain<const int32_t>(bounds, ScalarType::Int, sequences + 1, "bounds"), small(x.size(2) * x.size(4)),
          side > 0 ? side : 1};
}

struct Options {
  int64_t map;
  double rate;
  int64_t divisor;
  double eps, scale, offset;
};

// What both directions share; `parts` has a slot for each of `runs` runs.
LinearParams common_params(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
                           const MaybeTensor& weight, const MaybeTensor& cu_q, const MaybeTensor& cu_k, const Options& o,
                           int64_t splits, int64_t query_splits, int64_t runs, const Tensor& parts, const Tensor& state) {
  const ScalarType type = q.scalar_type(), f32 = ScalarType::Float;
  STD_TORCH_CHECK(q.dim() == 7 && k.dim() == 7 && v.dim() == 7, "linear_attention: q, k and v are maps cut in windows");
  STD_TORCH_CHECK(bool(cu_q) == bool(cu_k), "linear_attention: bounds of queries and of keys go together");
  STD_TORCH_CHECK(o.map >= 0 && o.map <= 5 && o.divisor >= 0 && o.divisor <= 5, "linear_attention: unknown map or divisor");
  LinearParams p{};
  p.q = view_of(q, q, 7, type);
  p.k = view_of(k, k, 7, type);
  p.v = view_of(v, k, 7, type);
  p.mask = view_of(mask, k, 5, ScalarType::Bool);
  p.weight = view_of(weight, k, 6, f32);
  p.rows = small(q.size(1));
  p.columns = small(cu_q ? cu_q->numel() - 1 : q.size(3));
  p.sequences = small(q.size(0) * (cu_q ? int64_t(p.columns) : q.size(1) * q.size(3)));
  p.queries = axis_of(q, cu_q, p.columns);
  p.keys = axis_of(k, cu_k, p.columns);
  const int64_t heads = q.size(5), kv_heads = k.size(5), d = q.size(6), e = v.size(6);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && k.size(6) == d && k.size(0) == q.size(0),
                  "linear_attention: the heads of k must divide those of q; q and k share B and D");
  STD_TORCH_CHECK(d > 0 && e > 0 && d % 8 == 0 && e % 8 == 0 && d <= kLinearWidth && e <= kLinearWidth,
                  "linear_attention: the CUDA kernel takes D and Dv that are multiples of 8 up to ", kLinearWidth);
  p.heads = small(heads);
  p.group = small(heads / kv_heads);
  p.d = int32_t(d);
  p.e = int32_t(e);
  p.map = FeatureMap(o.map);
  p.divisor = Divisor(o.divisor);
  p.rate = float(o.rate);
  p.scale = float(o.scale);
  p.offset = float(o.offset);
  p.eps = float(o.eps);
  p.slot = (d + 1) * (e + 4);
  p.splits = small(splits);
  p.query_splits = small(query_splits);
  const int64_t units = p.sequences * kv_heads;
  const int64_t most = (int64_t(1) << 31) - 1;
  STD_TORCH_CHECK(splits > 0 && query_splits > 0 && units * splits <= most && p.sequences * heads * query_splits <= most,
                  "linear_attention: each sequence and head has at least one run, and all together less than 2^31");
  p.parts = plain<float>(parts, f32, runs * units * p.slot, "parts");
  p.state = plain<float>(state, f32, units * (d + 1) * (e + 1), "state");
  return p;
}

void forward(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor weight, MaybeTensor cu_q, MaybeTensor cu_k,
             int64_t map, double rate, int64_t divisor, double eps, double scale, double offset, int64_t splits,
             int64_t query_splits, Tensor parts, Tensor out, Tensor state) {
  const Options o{map, rate, divisor, eps, scale, offset};
  LinearParams p = common_params(q, k, v, mask, weight, cu_q, cu_k, o, splits, query_splits, splits, parts, state);
  p.out = view_of(out, q, 7, q.scalar_type());
  STD_TORCH_CHECK(out.size(6) == v.size(6), "linear_attention: out must have the channels of v");
  const DeviceStream device(q);
  linear_attention_forward(p, element_of(q, "linear_attention"), device.stream);
}

void backward(Tensor dout, MaybeTensor dstate, Tensor state, Tensor q, Tensor k, Tensor v, MaybeTensor mask,
              MaybeTensor weight, MaybeTensor cu_q, MaybeTensor cu_k, int64_t map, double rate, int64_t divisor, double eps,
              double scale, double offset, bool detach, int64_t splits, int64_t query_splits, Tensor factors, Tensor parts,
              MaybeTensor dq, MaybeTensor dk, MaybeTensor dv, MaybeTensor dweight) {
  const Options o{map, rate, divisor, eps, scale, offset};
  const ScalarType type = q.scalar_type(), f32 = ScalarType::Float;
  LinearBackwardParams b{};
  b.p = common_params(q, k, v, mask, weight, cu_q, cu_k, o, splits, query_splits, query_splits, parts, state);
  b.dout = view_of(dout, q, 7, type);
  b.dq = view_of(dq, q, 7, type);
  b.dk = view_of(dk, k, 7, type);
  b.dv = view_of(dv, k, 7, type);
  b.dweight = view_of(dweight, k, 6, f32);
  STD_TORCH_CHECK(dout.size(6) == v.size(6) && (!dq || dq->size(6) == q.size(6)) && (!dk || dk->size(6) == q.size(6)) &&
                      (!dv || dv->size(6) == v.size(6)),
                  "linear_attention: gradients must have the channels of what they belong to");
  int64_t rows = 1;  // of q
  for (int64_t i = 0; i < 6; ++i) rows *= q.size(i);
  STD_TORCH_CHECK(factors.dim() == 7 && factors.size(0) == 3, "linear_attention: three factors for each query");
  b.factors.data = plain<float>(factors, f32, 3 * rows, "factors");
  for (int64_t i = 0; i < 6; ++i) b.factors.stride[i] = q.size(i) <= 1 ? 0 : factors.stride(1 + i);
  b.apart = rows;
  b.dstate = plain<const float>(dstate, f32, state.numel(), "dstate");
  b.detach = detach;
  const DeviceStream device(q);
  linear_attention_backward(b, element_of(q, "linear_attention"), device.stream);
}

}  // namespace

VITKERN_REGISTER(CUDA, m) {
  m.impl("_linear_attention_cuda_fwd", TORCH_BOX(&forward));
  m.impl("_linear_attention_cuda_bwd", TORCH_BOX(&backward));
}
