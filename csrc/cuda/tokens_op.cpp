// The private torch ops of the CUDA kernels of token matching and merging: tensors to parameters, checks, registration.
#include "tokens.h"

#include "op.h"

namespace {

using namespace vitkern;

TokenType type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "vitkern: the CUDA kernels of token operators take float32, bfloat16 and float16");
  return type == ScalarType::Float ? TokenType::float32
         : type == ScalarType::BFloat16 ? TokenType::bfloat16 : TokenType::float16;
}

int32_t small(int64_t n) {
  STD_TORCH_CHECK(n >= 0 && n < (int64_t(1) << 31), "vitkern: a size of 2^31 or more");
  return int32_t(n);
}

// Data of a contiguous [rows, n] tensor and the distance of its rows: 0 where it has one row for all.
template <class T>
const T* per_sample(const MaybeTensor& x, ScalarType type, int64_t batch, int64_t n, int64_t& stride) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->dim() == 2 && (x->size(0) == batch || x->size(0) == 1), "vitkern: one row, or one per sample");
  stride = x->size(0) == 1 ? 0 : n;
  return plain<const T>(x, type, x->size(0) * n, "a tensor with a row per sample");
}

void match(Tensor metric, MaybeTensor role, MaybeTensor segments, int64_t protect, Ints window, bool cosine,
           double eps, Tensor score, Tensor dst, Tensor role_out) {
  const auto size = metric.sizes(), stride = metric.strides();
  STD_TORCH_CHECK(metric.dim() == 3 || metric.dim() == 4, "vitkern: metric must be [B, N, C] or [B, N, H, C]");
  const bool heads = metric.dim() == 4;
  MatchParams p{};
  p.metric = metric.data_ptr();
  p.type = type_of(metric);
  p.batch = small(size[0]);
  p.tokens = small(size[1]);
  p.heads = heads ? small(size[2]) : 1;
  p.width = small(size[heads ? 3 : 2]);
  p.batch_stride = stride[0];
  p.token_stride = stride[1];
  p.head_stride = heads ? stride[2] : 0;
  STD_TORCH_CHECK(p.width <= 1 || stride[heads ? 3 : 2] == 1, "vitkern: the metric's last dimension must be contiguous");
  p.role = per_sample<int8_t>(role, ScalarType::Char, p.batch, p.tokens, p.role_batch);
  p.segments = per_sample<int32_t>(segments, ScalarType::Int, p.batch, p.tokens, p.segment_batch);
  p.protect = int32_t(protect);
  STD_TORCH_CHECK(window.empty() || window.size() == 1 || window.size() == 4, "vitkern: window must be [], [w] or "
                  "[wy, wx, rows, columns]");
  p.window.axes = window.size() == 4 ? 2 : int32_t(window.size());
  for (int i = 0; i < p.window.axes; ++i) p.window.sides[i] = small(window[i]);
  if (p.window.axes == 2) {
    p.window.grid_start = small(p.tokens - window[2] * window[3]);
    p.window.grid_width = small(window[3]);
  }
  p.cosine = cosine;
  p.eps = float(eps);
  const int64_t count = int64_t(p.batch) * p.tokens;
  p.score = plain<float>(score, ScalarType::Float, count, "score");
  p.dst = plain<int32_t>(dst, ScalarType::Int, count, "dst");
  p.role_out = plain<int8_t>(role_out, ScalarType::Char, count, "role");
  const DeviceStream device(metric);
  token_match(p, device.stream);
}

void plan(Tensor score, Tensor dst, Tensor role, MaybeTensor r, MaybeTensor threshold, int64_t most, int64_t order,
          Tensor token_map, Tensor perm, Tensor offsets, Tensor lengths) {
  STD_TORCH_CHECK(score.dim() == 2 && offsets.dim() == 2, "vitkern: score must be [B, N] and offsets [B, n_out + 1]");
  PlanParams p{};
  p.batch = small(score.size(0));
  p.tokens = small(score.size(1));
  p.slots = small(offsets.size(1)) - 1;
  p.most = small(most);
  p.order = PlanOrder(order);
  STD_TORCH_CHECK(p.tokens <= kPlanTokens && p.slots >= 0 && order >= 0 && order <= 2,
                  "vitkern: the CUDA kernel of merge_plan takes at most ", kPlanTokens, " tokens");
  const ScalarType i32 = ScalarType::Int;
  const int64_t count = int64_t(p.batch) * p.tokens;
  p.score = plain<const float>(score, ScalarType::Float, count, "score");
  p.dst = plain<const int32_t>(dst, i32, count, "dst");
  p.role = plain<const int8_t>(role, ScalarType::Char, count, "role");
  p.r = plain<const int32_t>(r, i32, p.batch, "r");
  p.threshold = plain<const float>(threshold, ScalarType::Float, p.batch, "threshold");
  p.token_map = plain<int32_t>(token_map, i32, count, "token_map");
  p.perm = plain<int32_t>(perm, i32, count, "perm");
  p.offsets = plain<int32_t>(offsets, i32, int64_t(p.batch) * (p.slots + 1), "offsets");
  p.lengths = plain<int32_t>(lengths, i32, p.batch, "lengths");
  const DeviceStream device(score);
  token_plan(p, device.stream);
}

// The view of [B, n, C]; clears `vector` where its rows are not whole aligned 16-byte words.
TokenRows rows_of(const MaybeTensor& x, const MergeParams& p, int64_t n, int32_t& vector) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == p.batch && x->size(1) == n && x->size(2) == p.width &&
                      type_of(*x) == p.type && (p.width <= 1 || x->stride(2) == 1),
                  "vitkern: rows must be [B, n, C] of one dtype with a contiguous last dimension");
  const TokenRows rows{x->data_ptr(), x->stride(0), x->stride(1)};
  const int64_t whole = p.type == TokenType::float32 ? 4 : 8;
  vector = vector && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && p.width % whole == 0 &&
           rows.batch % whole == 0 && rows.token % whole == 0;
  return rows;
}

MergeParams merge_params(const Tensor& like, const Tensor& token_map, const Tensor& perm, const Tensor& offsets) {
  MergeParams p{};
  STD_TORCH_CHECK(like.dim() == 3 && token_map.dim() == 2 && offsets.dim() == 2, "vitkern: the plan is [B, N]");
  p.batch = small(token_map.size(0));
  p.tokens = small(token_map.size(1));
  p.slots = small(offsets.size(1)) - 1;
  p.width = small(like.size(2));
  p.type = type_of(like);
  p.vector = 1;
  const int64_t count = int64_t(p.batch) * p.tokens;
  p.token_map = plain<const int32_t>(token_map, ScalarType::Int, count, "token_map");
  p.perm = plain<const int32_t>(perm, ScalarType::Int, count, "perm");
  p.offsets = plain<const int32_t>(offsets, ScalarType::Int, int64_t(p.batch) * (p.slots + 1), "offsets");
  return p;
}

void set_reduce(MergeParams& p, const MaybeTensor& weight, int64_t reduce, bool include_dst) {
  STD_TORCH_CHECK(reduce >= 0 && reduce <= 4, "vitkern: reduce must be mean, sum, max, first or mlerp");
  p.reduce = TokenReduce(reduce);
  STD_TORCH_CHECK(p.reduce != TokenReduce::mlerp || (include_dst && p.width <= kMlerpWidth),
                  "vitkern: the CUDA kernel of mlerp counts every token and takes at most ", kMlerpWidth, " channels");
  p.include_dst = include_dst;
  p.weight = plain<const float>(weight, ScalarType::Float, int64_t(p.batch) * p.tokens, "weight");
}

void merge(Tensor x, Tensor token_map, Tensor perm, Tensor offsets, MaybeTensor weight, int64_t reduce,
           bool include_dst, Tensor y, Tensor size) {
  MergeParams p = merge_params(x, token_map, perm, offsets);
  set_reduce(p, weight, reduce, include_dst);
  p.x = rows_of(x, p, p.tokens, p.vector);
  p.y = rows_of(y, p, p.slots, p.vector);
  p.size = plain<float>(size, ScalarType::Float, int64_t(p.batch) * p.slots, "size");
  const DeviceStream device(x);
  token_merge(p, device.stream);
}

void merge_backward(MaybeTensor dy, MaybeTensor dsize, Tensor x, Tensor token_map, Tensor perm, Tensor offsets,
                    MaybeTensor weight, int64_t reduce, bool include_dst, MaybeTensor dx, MaybeTensor dweight) {
  MergeParams p = merge_params(x, token_map, perm, offsets);
  set_reduce(p, weight, reduce, include_dst);
  p.x = rows_of(x, p, p.tokens, p.vector);
  p.dy = rows_of(dy, p, p.slots, p.vector);
  p.dx = rows_of(dx, p, p.tokens, p.vector);
  p.dsize = plain<const float>(dsize, ScalarType::Float, int64_t(p.batch) * p.slots, "dsize");
  p.dweight = plain<float>(dweight, ScalarType::Float, int64_t(p.batch) * p.tokens, "dweight");
  const DeviceStream device(x);
  token_merge_backward(p, device.stream);
}

void unmerge(Tensor y, Tensor token_map, Tensor perm, Tensor offsets, double fill, Tensor x) {
  MergeParams p = merge_params(y, token_map, perm, offsets);
  p.y = rows_of(y, p, p.slots, p.vector);
  p.x = rows_of(x, p, p.tokens, p.vector);
  p.fill = float(fill);
  const DeviceStream device(y);
  token_unmerge(p, device.stream);
}

}  // namespace

VITKERN_REGISTER(CUDA, m) {
  m.impl("_bipartite_match_cuda", TORCH_BOX(&match));
  m.impl("_merge_plan_cuda", TORCH_BOX(&plan));
  m.impl("_merge_tokens_cuda", TORCH_BOX(&merge));
  m.impl("_merge_tokens_cuda_bwd", TORCH_BOX(&merge_backward));
  m.impl("_unmerge_tokens_cuda", TORCH_BOX(&unmerge));
}
