// The private torch op of the CUDA kernels of linear attention: tensors to parameters, checks, registration.
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

void forward(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor weight, MaybeTensor cu_q, MaybeTensor cu_k,
             int64_t map, double rate, int64_t divisor, double eps, double scale, double offset, int64_t query_splits,
             Tensor parts, Tensor out, Tensor state) {
  const ScalarType type = q.scalar_type(), f32 = ScalarType::Float;
  STD_TORCH_CHECK(q.dim() == 7 && k.dim() == 7 && v.dim() == 7, "linear_attention: q, k and v are maps cut in windows");
  STD_TORCH_CHECK(bool(cu_q) == bool(cu_k), "linear_attention: bounds of queries and of keys go together");
  STD_TORCH_CHECK(map >= 0 && map <= 5 && divisor >= 0 && divisor <= 5, "linear_attention: unknown map or divisor");
  LinearParams p{};
  p.q = view_of(q, q, 7, type);
  p.k = view_of(k, k, 7, type);
  p.v = view_of(v, k, 7, type);
  p.out = view_of(out, q, 7, type);
  p.mask = view_of(mask, k, 5, ScalarType::Bool);
  p.weight = view_of(weight, k, 6, f32);
  p.rows = small(q.size(1));
  p.columns = small(cu_q ? cu_q->numel() - 1 : q.size(3));
  p.sequences = small(q.size(0) * (cu_q ? int64_t(p.columns) : q.size(1) * q.size(3)));
  p.queries = axis_of(q, cu_q, p.columns);
  p.keys = axis_of(k, cu_k, p.columns);
  const int64_t heads = q.size(5), kv_heads = k.size(5), d = q.size(6), e = v.size(6);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && k.size(6) == d && out.size(6) == e && k.size(0) == q.size(0),
                  "linear_attention: the heads of k must divide those of q; q and k share B and D, v and out Dv");
  STD_TORCH_CHECK(d > 0 && e > 0 && d % 8 == 0 && e % 8 == 0 && d <= kLinearWidth && e <= kLinearWidth,
                  "linear_attention: the CUDA kernel takes D and Dv that are multiples of 8 up to ", kLinearWidth);
  p.heads = small(heads);
  p.group = small(heads / kv_heads);
  p.d = int32_t(d);
  p.e = int32_t(e);
  p.map = FeatureMap(map);
  p.divisor = Divisor(divisor);
  p.rate = float(rate);
  p.scale = float(scale);
  p.offset = float(offset);
  p.eps = float(eps);
  p.slot = (d + 1) * (e + 4);
  p.splits = small(parts.size(0));
  p.query_splits = small(query_splits);
  const int64_t units = p.sequences * kv_heads;
  STD_TORCH_CHECK(p.splits > 0 && p.query_splits > 0 && units * p.splits < (int64_t(1) << 31) &&
                      p.sequences * heads * p.query_splits < (int64_t(1) << 31),
                  "linear_attention: each sequence and head has at least one run, and all together less than 2^31");
  p.parts = plain<float>(parts, f32, p.splits * units * p.slot, "parts");
  p.state = plain<float>(state, f32, units * (d + 1) * (e + 1), "state");
  const DeviceStream device(q);
  linear_attention_forward(p, element_of(q, "linear_attention"), device.stream);
}

}  // namespace

VITKERN_REGISTER(CUDA, m) { m.impl("_linear_attention_cuda_fwd", TORCH_BOX(&forward)); }
