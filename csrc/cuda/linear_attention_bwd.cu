// linear_attention, backward, on tensor cores: the gradients of queries, which leave three factors for each; the gradients
// of the sums, by the kernel that sums keys forward; the gradients of keys and values. As in the forward no block waits
// for another, and runs are added in order. Numerators are computed again.
#include "linear_attention_sums.cuh"

namespace vitkern {
namespace {

// S | z | the values | their number of the forward in shared memory.
template <class S>
__device__ __forceinline__ void load_state(const LinearParams& p, int unit, float* s) {
  float *z = s + S::kWidth * S::kPitch, *values = z + S::kWidth;
  const float* state = p.state + unit * int64_t(p.d + 1) * (p.e + 1);
  for (int i = threadIdx.x; i < (p.d + 1) * (p.e + 1); i += S::kQueryThreads) {
    const int row = i / (p.e + 1), column = i % (p.e + 1);
    if (row < p.d) (column < p.e ? s[row * S::kPitch + column] : z[row]) = state[i];
    else values[column < p.e ? column : S::kWidth] = state[i];
  }
}

// Adds the gradient of the state itself.
template <class S>
__device__ __forceinline__ void add_state_gradient(const LinearBackwardParams& b, int unit, float* s) {
  const LinearParams& p = b.p;
  float *z = s + S::kWidth * S::kPitch, *values = z + S::kWidth;
  const float* given = b.dstate + unit * int64_t(p.d + 1) * (p.e + 1);
  for (int i = threadIdx.x; i < (p.d + 1) * (p.e + 1); i += S::kQueryThreads) {
    const int row = i / (p.e + 1), column = i % (p.e + 1);
    if (row < p.d) (column < p.e ? s[row * S::kPitch + column] : z[row]) += given[i];
    else if (column < p.e) values[column] += given[i];
  }
}

// dq and the factors of a run of queries. Grid: sequences x heads (fastest), query_splits.
template <class T, class S>
__global__ void __launch_bounds__(S::kQueryThreads, S::kGradientBlocks)
    linear_query_gradients_kernel(const LinearBackwardParams b) {
  const LinearParams& p = b.p;
  unsigned char* shared = dynamic_shared();
  float* s = reinterpret_cast<float*>(shared);
  const float *z = s + S::kWidth * S::kPitch, *values = z + S::kWidth;
  const Lane me = this_lane();
  const int units = p.sequences * p.heads, unit = blockIdx.x % units;
  const int sequence = unit / p.heads, head = unit % p.heads;
  const Run run = run_of(p.queries, sequence, blockIdx.x / units, p.query_splits);
  const int64_t q_at = head_offset(p, p.q, sequence, head), dout_at = head_offset(p, b.dout, sequence, head);
  const int64_t dq_at = head_offset(p, b.dq, sequence, head), factors_at = head_offset(p, b.factors, sequence, head);
  unsigned char *q = shared + S::kSums + me.warp * 16 * S::kRowBytes, *dout = q + S::kMatrixBytes;

  load_state<S>(p, sequence * (p.heads / p.group) + head / p.group, s);
  __syncthreads();
  const float n = values[S::kWidth];
  for (int tile = 0; run.start + tile * kLinearTile < run.stop; ++tile) {
    load_rows<S>(p.queries, p.q, q_at, run, tile, p.d, q, me);
    load_rows<S>(p.queries, b.dout, dout_at, run, tile, p.e, dout, me);
    copy_wait_all();
    __syncwarp();  // both rows are complete
    float num[S::kGroups][4] = {}, dot[2] = {}, inverse[2], of_dot[2], along[2] = {};
    multiply_features<T, S>(p, q, s, me, num, dot, inverse);
    const Factors of[2] = {factors_of(p, dot[0], n), factors_of(p, dot[1], n)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float of_num = p.divisor == Divisor::subtract ? 0.0f : of[h].of_num * inverse[h];
      const float of_values = p.divisor == Divisor::subtract ? 1.0f : of[h].of_values;
#pragma unroll
      for (int c = 0; c < S::kGroups; ++c) {
        if (c * 8 >= p.e) break;
        const float2 v = *reinterpret_cast<const float2*>(values + c * 8 + 2 * me.t);
        const float2 g = unpack2<T>(word_of<S>(dout, c, h, me));
        along[h] += g.x * (num[c][2 * h] * of_num + v.x * of_values) + g.y * (num[c][2 * h + 1] * of_num + v.y * of_values);
      }
      along[h] = row_sum(along[h]);
      of_dot[h] = b.detach || of[h].of_dot == 0.0f ? 0.0f : along[h] * of[h].of_dot;
      const int t = run.start + tile * kLinearTile + me.warp * 16 + me.g + 8 * h;
      if (me.t == 0 && t < run.stop) {
        float* to = static_cast<float*>(b.factors.data) + factors_at + token_offset(p.queries, b.factors, run.first + t);
        to[0] = of[h].of_num * inverse[h];
        to[b.apart] = of_dot[h] * inverse[h];
        to[2 * b.apart] = of[h].of_values;
      }
    }
    if (b.dq.data == nullptr) {
      __syncwarp();  // both rows have been read
      continue;
    }
    float g[S::kGroups][4] = {};
    multiply_values<T, S>(p, dout, s, me, g);
#pragma unroll
    for (int c = 0; c < S::kGroups; ++c) {
      if (c * 8 >= p.d) break;
      const float2 two = *reinterpret_cast<const float2*>(z + c * 8 + 2 * me.t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        g[c][2 * h] = g[c][2 * h] * of[h].of_num + of_dot[h] * two.x;
        g[c][2 * h + 1] = g[c][2 * h + 1] * of[h].of_num + of_dot[h] * two.y;
      }
    }
    if (p.map == FeatureMap::silu_norm) features_by_gradients<T, S>(p, q, me, g, inverse, along);
    put_gradients<T, S>(p, q, me, g, inverse, along);
    __syncwarp();  // the gradients are complete; a lane stores the chunks into which it will load
    store_rows<S>(p.queries, b.dq, dq_at, run, tile, p.d, q, me);
  }
}

// dk, dv and dweight of a run of keys. Grid: sequences x key heads (fastest), splits.
template <class T, class S>
__global__ void __launch_bounds__(S::kQueryThreads, S::kGradientBlocks)
    linear_key_gradients_kernel(const LinearBackwardParams b, int slots) {
  const LinearParams& p = b.p;
  unsigned char* shared = dynamic_shared();
  float* s = reinterpret_cast<float*>(shared);
  const float *z = s + S::kWidth * S::kPitch, *values = z + S::kWidth;
  const Lane me = this_lane();
  const int heads = p.heads / p.group, units = p.sequences * heads, unit = blockIdx.x % units;
  const int sequence = unit / heads, head = unit % heads;
  const Run run = run_of(p.keys, sequence, blockIdx.x / units, p.splits);
  const int64_t k_at = head_offset(p, p.k, sequence, head), v_at = head_offset(p, p.v, sequence, head);
  const int64_t mask_at = head_offset(p, p.mask, sequence, 0), weight_at = head_offset(p, p.weight, sequence, head);
  const int64_t dk_at = head_offset(p, b.dk, sequence, head), dv_at = head_offset(p, b.dv, sequence, head);
  const int64_t dweight_at = head_offset(p, b.dweight, sequence, head);
  unsigned char *k = shared + S::kSums + me.warp * 16 * S::kRowBytes, *v = k + S::kMatrixBytes;

  load_sums<S>(p, unit, slots, false, s);
  __syncthreads();  // the sums are complete
  if (b.dstate != nullptr) {
    add_state_gradient<S>(b, unit, s);
    __syncthreads();  // and so they are with the gradient of the state
  }
  for (int tile = 0; run.start + tile * kLinearTile < run.stop; ++tile) {
    load_rows<S>(p.keys, p.k, k_at, run, tile, p.d, k, me, &p.mask, mask_at);
    load_rows<S>(p.keys, p.v, v_at, run, tile, p.e, v, me, &p.mask, mask_at);
    float weight[2];  // 0 of what is hidden, whose gradients are 0
    bool seen[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = run.start + tile * kLinearTile + me.warp * 16 + me.g + 8 * h, token = run.first + t;
      seen[h] = t < run.stop;
      if (seen[h] && p.mask.data != nullptr)
        seen[h] = static_cast<const uint8_t*>(p.mask.data)[mask_at + token_offset(p.keys, p.mask, token)] != 0;
      weight[h] = seen[h] ? 1.0f : 0.0f;
      if (seen[h] && p.weight.data != nullptr)
        weight[h] = static_cast<const float*>(p.weight.data)[weight_at + token_offset(p.keys, p.weight, token)];
    }
    copy_wait_all();
    __syncwarp();  // both rows are complete
    float dv[S::kGroups][4] = {}, g[S::kGroups][4] = {}, dot[2] = {}, inverse[2], along[2] = {};
    multiply_features<T, S>(p, k, s, me, dv, dot, inverse);
    multiply_values<T, S>(p, v, s, me, g);
#pragma unroll
    for (int c = 0; c < S::kGroups; ++c) {
      if (c * 8 >= p.d) break;
      const float2 two = *reinterpret_cast<const float2*>(z + c * 8 + 2 * me.t);
#pragma unroll
      for (int i = 0; i < 4; ++i) g[c][i] = g[c][i] + (i % 2 ? two.y : two.x);
    }
    if (p.map == FeatureMap::silu_norm || b.dweight.data != nullptr)
      features_by_gradients<T, S>(p, k, me, g, inverse, along);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = run.start + tile * kLinearTile + me.warp * 16 + me.g + 8 * h;
      if (b.dweight.data != nullptr && me.t == 0 && t < run.stop)
        static_cast<float*>(b.dweight.data)[dweight_at + token_offset(p.keys, b.dweight, run.first + t)] =
            seen[h] ? along[h] : 0.0f;
      along[h] *= weight[h];
    }
#pragma unroll
    for (int c = 0; c < S::kGroups; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        g[c][2 * h] *= weight[h];
        g[c][2 * h + 1] *= weight[h];
        if (c * 8 >= p.e) continue;
        const float2 sum = *reinterpret_cast<const float2*>(values + c * 8 + 2 * me.t);
        const float of = inverse[h] * weight[h];
        word_of<S>(v, c, h, me) =
            seen[h] ? pack2<T>(dv[c][2 * h] * of + sum.x, dv[c][2 * h + 1] * of + sum.y) : 0u;
      }
    put_gradients<T, S>(p, k, me, g, inverse, along);
    __syncwarp();  // the gradients are complete; a lane stores the chunks into which it will load
    if (b.dv.data != nullptr) store_rows<S>(p.keys, b.dv, dv_at, run, tile, p.e, v, me);
    if (b.dk.data != nullptr) store_rows<S>(p.keys, b.dk, dk_at, run, tile, p.d, k, me);
  }
}

}  // namespace

void linear_attention_backward(const LinearBackwardParams& b, Element element, void* stream) {
  const LinearParams& p = b.p;
  if (p.sequences == 0) return;
  const int64_t blocks = int64_t(p.sequences) * (p.heads / p.group) * p.splits;
  with_tile(p, element, [&](auto type, auto shape) {
    using T = decltype(type);
    using S = decltype(shape);
    launch("linear_attention_query_gradients", linear_query_gradients_kernel<T, S>,
           int64_t(p.sequences) * p.heads * p.query_splits, S::kQueryThreads, S::kQueryBytes, stream, b);
    if (b.dk.data == nullptr && b.dv.data == nullptr && b.dweight.data == nullptr) return;
    const QuerySums of{b.dout, b.factors, b.apart};
    const int slots = sum_tokens<T, S, true>(p, of, p.query_splits, blocks, stream);
    launch("linear_attention_key_gradients", linear_key_gradients_kernel<T, S>, blocks, S::kQueryThreads, S::kQueryBytes,
           stream, b, slots);
  });
}

}  // namespace vitkern
