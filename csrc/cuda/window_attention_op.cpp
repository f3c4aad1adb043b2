// The private torch ops of the CUDA kernels of window attention: tensors to parameters, checks, registration.
//
// Shapes were checked in Python, where messages name arguments; the checks here are a second fence around what the
// kernels rely on.
#include <cmath>

#include "../common/philox.h"
#include "op.h"
#include "window_attention.h"

namespace {

using namespace vitkern;

// A map [B, *L, H, D] (`channels`) or [B, *L, H], right-aligned to four axes.
TokenView token_view(const Tensor& x, size_t rank, bool channels, int64_t element_bytes) {
  TokenView v{};
  v.data = x.data_ptr();
  STD_TORCH_CHECK(x.dim() == int64_t(rank) + (channels ? 3 : 2), "window_attention: a map has a wrong number of axes");
  const auto strides = x.strides();
  v.batch = strides[0];
  v.head = strides[rank + 1];
  for (size_t i = 0; i < rank; ++i) {
    STD_TORCH_CHECK(strides[1 + i] < (int64_t(1) << 31), "window_attention: the CUDA kernel takes strides below 2^31");
    v.axis[kMaxAxes - rank + i] = int32_t(strides[1 + i]);
  }
  if (!channels) return v;
  STD_TORCH_CHECK(x.size(-1) <= 1 || strides[rank + 2] == 1,
                  "window_attention: the CUDA kernel needs a contiguous last dimension");
  const int64_t chunk = 16 / element_bytes;
  v.vector = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.batch % chunk == 0 && v.head % chunk == 0;
  for (int64_t stride : v.axis) v.vector = v.vector && stride % chunk == 0;
  return v;
}

struct Options {
  const Ints &window, &shift;
  bool roll_first, pad_visible;
  double scale, mask_value, cosine_max, cosine_eps, dropout_p;
};

WindowParams common_params(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias,
                           const MaybeTensor& index, const MaybeTensor& logit_scale, const MaybeTensor& k_pad,
                           const MaybeTensor& v_pad, const MaybeTensor& seed, const Options& o) {
  WindowParams p{};
  const size_t rank = o.window.size();
  STD_TORCH_CHECK(rank >= 1 && rank <= kMaxAxes && o.shift.size() == rank,
                  "window_attention: window and shift must have 1 to 4 entries each");
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(k.scalar_type() == type && v.scalar_type() == type, "window_attention: q, k and v differ in dtype");
  p.q = token_view(q, rank, true, 2);
  p.k = token_view(k, rank, true, 2);
  p.v = token_view(v, rank, true, 2);
  const auto size = q.sizes(), k_size = k.sizes(), v_size = v.sizes();
  int64_t tokens = 1, windows = 1;
  WindowMap map{};
  map.rank = int32_t(rank);
  map.roll_first = o.roll_first;
  for (size_t i = 0; i < rank + 1; ++i)
    STD_TORCH_CHECK(k_size[i] == size[i] && v_size[i] == size[i], "window_attention: q, k and v differ in their maps");
  for (size_t i = 0; i < rank; ++i) {
    const int64_t length = size[1 + i], w = o.window[i], s = o.shift[i];
    STD_TORCH_CHECK(w >= 1 && s >= 0 && s < w, "window_attention: 0 <= shift < window must hold on every axis");
    tokens *= w;
    STD_TORCH_CHECK(tokens <= kMaxTokens && length < (int64_t(1) << 30),
                    "window_attention: the CUDA kernel takes windows of at most 64 tokens");
    map.axis[i] = {int32_t(length), int32_t(w), int32_t(s), int32_t((length + w - 1) / w)};
    windows *= (length + w - 1) / w;
  }
  const int64_t heads = size[rank + 1], kv_heads = k_size[rank + 1], d = size[rank + 2], dv = v_size[rank + 2];
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && v_size[rank + 1] == kv_heads && k_size[rank + 2] == d,
                  "window_attention: the heads of k and v must be equal and divide those of q; q and k share D");
  STD_TORCH_CHECK(d > 0 && dv > 0 && d % 8 == 0 && dv % 8 == 0 && d <= kMaxWidth && dv <= kMaxWidth,
                  "window_attention: the CUDA kernel takes D and Dv that are multiples of 8 up to 128");
  STD_TORCH_CHECK(windows < (int64_t(1) << 31), "window_attention: more than 2^31 windows in an image");
  map.size = int32_t(tokens);
  map.windows = int32_t(windows);
  p.map = make_walk(map);
  p.windows = windows * size[0];
  p.heads = int32_t(heads);
  p.group = int32_t(heads / kv_heads);
  p.d = int32_t(d);
  p.dv = int32_t(dv);
  if (bias) {
    const ScalarType t = bias->scalar_type();
    STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half,
                    "window_attention: the bias must be float32, bfloat16 or float16");
    p.bias_type = t == ScalarType::Float      ? BiasType::float32
                  : t == ScalarType::BFloat16 ? BiasType::bfloat16
                                              : BiasType::float16;
    p.bias = bias->data_ptr();
    if (index) {
      STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) > 0 && bias->size(1) == heads && index->dim() == 2 &&
                          index->size(0) == tokens && index->size(1) == tokens &&
                          index->scalar_type() == ScalarType::Int,
                      "window_attention: a bias table is [R, H] with an int32 index [N, N]");
      p.index = static_cast<const int32_t*>(index->data_ptr());
      for (int i = 0; i < 2; ++i) {
        p.bias_stride[i] = bias->stride(i);
        p.index_stride[i] = index->stride(i);
      }
      p.table_rows = bias->size(0);
    } else {
      STD_TORCH_CHECK(bias->dim() == 3, "window_attention: a dense bias is broadcastable to [H, N, N]");
      for (int i = 0; i < 3; ++i) {
        const int64_t full = i == 0 ? heads : tokens;
        STD_TORCH_CHECK(bias->size(i) == full || bias->size(i) == 1,
                        "window_attention: a dense bias is broadcastable to [H, N, N]");
        p.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
      }
    }
  }
  p.logit_scale = plain<const float>(logit_scale, ScalarType::Float, heads, "logit_scale");
  p.k_pad = plain(k_pad, type, kv_heads * d, "k_pad");
  p.v_pad = plain(v_pad, type, kv_heads * dv, "v_pad");
  if (!o.pad_visible) p.k_pad = p.v_pad = nullptr;
  p.pad_visible = o.pad_visible;
  p.scale = float(o.scale);
  p.mask_value = float(o.mask_value);
  p.cosine_max = float(o.cosine_max);
  p.cosine_eps = float(o.cosine_eps);
  if (o.dropout_p > 0.0) {
    STD_TORCH_CHECK(seed.has_value(), "window_attention: dropout needs a seed");
    const bool counted = seed->numel() > 1;
    p.seed = plain<const int64_t>(seed, ScalarType::Long, counted ? 2 : 1, "seed");
    if (counted) p.first_head = p.seed + 1;
    p.dropout_threshold = dropout_threshold(o.dropout_p);
    p.dropout_scale = float(1.0 / (1.0 - o.dropout_p));
  }
  return p;
}

TokenView lse_view(const Tensor& lse, size_t rank) {
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "window_attention: lse must be float32");
  return token_view(lse, rank, false, 4);
}

void forward(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor index, MaybeTensor logit_scale,
             MaybeTensor k_pad, MaybeTensor v_pad, MaybeTensor seed, Ints window, Ints shift, bool roll_first,
             bool pad_visible, double scale, double mask_value, double cosine_max, double cosine_eps,
             double dropout_p, Tensor out, Tensor lse) {
  const Options o{window, shift, roll_first, pad_visible, scale, mask_value, cosine_max, cosine_eps, dropout_p};
  WindowParams p = common_params(q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, o);
  STD_TORCH_CHECK(out.scalar_type() == v.scalar_type(), "window_attention: out must have the dtype of v");
  p.out = token_view(out, window.size(), true, 2);
  if (lse.numel() > 0) p.lse = lse_view(lse, window.size());
  const DeviceStream device(q);
  window_attention_forward(p, element_of(q, "window_attention"), device.stream);
}

void backward(Tensor dout, MaybeTensor dlse, Tensor lse, Tensor q, Tensor k, Tensor v, MaybeTensor bias,
              MaybeTensor index, MaybeTensor logit_scale, MaybeTensor k_pad, MaybeTensor v_pad, MaybeTensor seed,
              Ints window, Ints shift, bool roll_first, bool pad_visible, double scale, double mask_value,
              double cosine_max, double cosine_eps, double dropout_p, Tensor dq, Tensor dk, Tensor dv,
              MaybeTensor dbias, MaybeTensor dlogit_scale, MaybeTensor dk_pad, MaybeTensor dv_pad,
              Tensor workspace) {
  const Options o{window, shift, roll_first, pad_visible, scale, mask_value, cosine_max, cosine_eps, dropout_p};
  const size_t rank = window.size();
  const ScalarType type = q.scalar_type(), f32 = ScalarType::Float;
  WindowBackwardParams p{};
  p.w = common_params(q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, o);
  STD_TORCH_CHECK(dout.scalar_type() == type && dq.scalar_type() == type && dk.scalar_type() == type &&
                      dv.scalar_type() == type,
                  "window_attention: dout, dq, dk and dv must have the dtype of q");
  p.w.lse = lse_view(lse, rank);
  if (dlse) p.dlse = lse_view(*dlse, rank);
  p.dout = token_view(dout, rank, true, 2);
  p.dq = token_view(dq, rank, true, 2);
  p.dk = token_view(dk, rank, true, 2);
  p.dv = token_view(dv, rank, true, 2);
  const int64_t heads = p.w.heads, kv_heads = heads / p.w.group, n = p.w.map.size;
  STD_TORCH_CHECK(bias || !dbias, "window_attention: dbias without a bias");
  STD_TORCH_CHECK(logit_scale || !dlogit_scale, "window_attention: dlogit_scale without a logit_scale");
  p.dbias = plain<float>(dbias, f32, index ? p.w.table_rows * heads : heads * n * n, "dbias");
  p.dlogit_scale = plain<float>(dlogit_scale, f32, heads, "dlogit_scale");
  p.dk_pad = plain<float>(dk_pad, f32, kv_heads * p.w.d, "dk_pad");
  p.dv_pad = plain<float>(dv_pad, f32, kv_heads * p.w.dv, "dv_pad");
  const DeviceStream device(q);
  const int64_t floats = window_attention_workspace(heads, kv_heads, p.w.windows, n, p.w.d, p.w.dv);
  STD_TORCH_CHECK(workspace.scalar_type() == f32 && workspace.is_contiguous() && workspace.numel() >= floats,
                  "window_attention: workspace must hold ", floats, " float32");
  p.workspace = static_cast<float*>(workspace.data_ptr());
  window_attention_backward(p, element_of(q, "window_attention"), device.stream);
}

// On the current device.
int64_t workspace(int64_t heads, int64_t kv_heads, int64_t windows, int64_t tokens, int64_t d, int64_t dv) {
  return window_attention_workspace(heads, kv_heads, windows, tokens, d, dv);
}

}  // namespace

VITKERN_REGISTER(CUDA, m) {
  m.impl("_window_attention_cuda_fwd", TORCH_BOX(&forward));
  m.impl("_window_attention_cuda_bwd", TORCH_BOX(&backward));
}

VITKERN_REGISTER(CompositeExplicitAutograd, m) {
  m.impl("_window_attention_cuda_workspace", TORCH_BOX(&workspace));
}
