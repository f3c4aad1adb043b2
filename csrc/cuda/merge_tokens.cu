// merge_tokens and unmerge_tokens: a group of threads, a warp or a block, owns a slot (or, to unmerge, a token) and
// walks its tokens in the order of the plan; each thread owns channels. Nothing is added across threads but the inner
// products that the weights' gradients need, in a fixed order.
#include <math.h>

#include "tokens.cuh"

namespace vitkern {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ __forceinline__ T* row_of(const TokenRows& rows, int sample, int at) {
  return static_cast<T*>(rows.data) + sample * rows.batch + at * rows.token;
}

// kVector elements from channel c on: a 16-byte word, or one element.
template <class T, int kVector>
__device__ __forceinline__ void load(const T* from, float (&x)[kVector]) {
  if constexpr (kVector == 1) x[0] = load_one(from);
  else Words<T>::load(from, x);
}
template <class T, int kVector>
__device__ __forceinline__ void store(T* to, const float (&x)[kVector]) {
  if constexpr (kVector == 1) store_one(to, x[0]);
  else Words<T>::store(to, x);
}

// The slot of this thread's group: its tokens are perm[first], perm[first + 1] ... perm[end - 1].
struct Slot {
  int sample, slot, first, end, lane;
  bool exists;
};

// Group g of the grid owns slot g % per_sample; the slot p.slots is that of the tokens without one.
template <int kGroup>
__device__ __forceinline__ Slot slot_of(const MergeParams& p, int per_sample) {
  const int64_t g = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  Slot s{};
  s.lane = threadIdx.x % kGroup;
  s.exists = g < int64_t(p.batch) * per_sample;
  if (!s.exists) return s;
  s.sample = int(g / per_sample);
  s.slot = int(g % per_sample);
  const int32_t* offsets = p.offsets + int64_t(s.sample) * (p.slots + 1);
  s.first = offsets[s.slot];
  s.end = s.slot < p.slots ? offsets[s.slot + 1] : p.tokens;
  return s;
}

__device__ __forceinline__ int token_at(const MergeParams& p, const Slot& s, int place) {
  return p.perm[int64_t(s.sample) * p.tokens + place];
}

__device__ __forceinline__ float weight_of(const MergeParams& p, const Slot& s, int token) {
  return p.weight == nullptr ? 1.0f : p.weight[int64_t(s.sample) * p.tokens + token];
}

// The first token whose weight counts, and the sum of the weights.
__device__ __forceinline__ int counted_from(const MergeParams& p, const Slot& s) {
  return p.include_dst ? s.first : min(s.first + 1, s.end);
}
__device__ __forceinline__ float total_weight(const MergeParams& p, const Slot& s) {
  float total = 0.0f;
  for (int i = counted_from(p, s); i < s.end; ++i) total += weight_of(p, s, token_at(p, s, i));
  return total;
}

template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeParams p) {
  const Slot s = slot_of<kGroup>(p, p.slots);
  if (!s.exists) return;
  const float total = total_weight(p, s);
  if (s.lane == 0) p.size[int64_t(s.sample) * p.slots + s.slot] = total;
  const bool sums = p.reduce == TokenReduce::mean || p.reduce == TokenReduce::sum;
  const int from = sums ? counted_from(p, s) : s.first;
  const int to = p.reduce == TokenReduce::first ? min(s.first + 1, s.end) : s.end;
  for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
    float y[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) y[v] = p.reduce == TokenReduce::max && to > from ? -INFINITY : 0.0f;
    for (int i = from; i < to; ++i) {
      const int token = token_at(p, s, i);
      const float w = sums ? weight_of(p, s, token) : 1.0f;
      float x[kVector];
      load<T, kVector>(row_of<T>(p.x, s.sample, token) + c, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (p.reduce == TokenReduce::max) y[v] = x[v] > y[v] || x[v] != x[v] ? x[v] : y[v];
        else y[v] += w * x[v];
      }
    }
    if (p.reduce == TokenReduce::mean)
#pragma unroll
      for (int v = 0; v < kVector; ++v) y[v] = total == 0.0f ? 0.0f : y[v] / total;
    store<T, kVector>(row_of<T>(p.y, s.sample, s.slot) + c, y);
  }
}

// The sum over the group of x, the same in every thread; each thread of the group calls it.
template <int kGroup>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  if (kGroup == 32) return x;
  __shared__ float warps[kThreads / 32];
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kGroup / 32; ++w) sum += warps[w];
  return sum;
}

// dweight_i = <dy, x_i> - <dy, y> over W for the mean, <dy, x_i> for the sum; and the gradient of the size.
template <class T, int kVector, int kGroup>
__device__ __forceinline__ void weight_gradient(const MergeParams& p, const Slot& s, float total) {
  const bool sums = p.reduce == TokenReduce::mean || p.reduce == TokenReduce::sum, mean = p.reduce == TokenReduce::mean;
  const float of_size = p.dsize == nullptr ? 0.0f : p.dsize[int64_t(s.sample) * p.slots + s.slot];
  float* dweight = p.dweight + int64_t(s.sample) * p.tokens;
  const int from = counted_from(p, s);
  float weighted = 0.0f;  // sum of w_i <dy, x_i>
  if (s.lane == 0 && from > s.first) dweight[token_at(p, s, s.first)] = 0.0f;
  for (int i = from; i < s.end; ++i) {
    const int token = token_at(p, s, i);
    float inner = 0.0f;
    if (sums && p.dy.data != nullptr && !(mean && total == 0.0f)) {
      for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
        float x[kVector], dy[kVector];
        load<T, kVector>(row_of<T>(p.x, s.sample, token) + c, x);
        load<T, kVector>(row_of<T>(p.dy, s.sample, s.slot) + c, dy);
#pragma unroll
        for (int v = 0; v < kVector; ++v) inner += x[v] * dy[v];
      }
      inner = group_sum<kGroup>(inner);
    }
    weighted += weight_of(p, s, token) * inner;
    if (s.lane == 0) dweight[token] = inner + (mean ? 0.0f : of_size);
  }
  if (!mean || s.lane != 0) return;
  for (int i = from; i < s.end; ++i) {
    float& of = dweight[token_at(p, s, i)];
    of = (total == 0.0f ? 0.0f : (of - weighted / total) / total) + of_size;
  }
}

template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) merge_backward_kernel(const MergeParams p) {
  const Slot s = slot_of<kGroup>(p, p.slots + 1);
  if (!s.exists) return;
  const bool dropped = s.slot == p.slots, sums = p.reduce == TokenReduce::mean || p.reduce == TokenReduce::sum;
  const float total = dropped ? 0.0f : total_weight(p, s);
  if (p.dweight != nullptr) {
    if (!dropped) weight_gradient<T, kVector, kGroup>(p, s, total);
    else
      for (int i = s.first + s.lane; i < s.end; i += kGroup)
        p.dweight[int64_t(s.sample) * p.tokens + token_at(p, s, i)] = 0.0f;
  }
  if (p.dx.data == nullptr) return;
  const bool nothing = dropped || p.dy.data == nullptr || (p.reduce == TokenReduce::mean && total == 0.0f);
  for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
    float dy[kVector] = {}, best[kVector] = {}, x[kVector];
    if (!nothing) load<T, kVector>(row_of<T>(p.dy, s.sample, s.slot) + c, dy);
    if (p.reduce == TokenReduce::max && !nothing) {  // dy over the number of tokens that attain the maximum
      float ties[kVector];
      for (int i = s.first; i < s.end; ++i) {
        load<T, kVector>(row_of<T>(p.x, s.sample, token_at(p, s, i)) + c, x);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (i == s.first || x[v] > best[v]) best[v] = x[v], ties[v] = 1.0f;
          else ties[v] += x[v] == best[v];
        }
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) dy[v] /= ties[v];
    }
    for (int i = s.first; i < s.end; ++i) {
      const int token = token_at(p, s, i);
      float dx[kVector];
      if (p.reduce == TokenReduce::max && !nothing) {
        load<T, kVector>(row_of<T>(p.x, s.sample, token) + c, x);
#pragma unroll
        for (int v = 0; v < kVector; ++v) dx[v] = x[v] == best[v] ? dy[v] : 0.0f;
      } else {
        float w = 0.0f;
        if (p.reduce == TokenReduce::first) w = i == s.first;
        else if (sums && i >= counted_from(p, s)) w = weight_of(p, s, token);
        if (p.reduce == TokenReduce::mean && !nothing) w /= total;
#pragma unroll
        for (int v = 0; v < kVector; ++v) dx[v] = nothing ? 0.0f : w * dy[v];
      }
      store<T, kVector>(row_of<T>(p.dx, s.sample, token) + c, dx);
    }
  }
}

// x_i = y of the slot of i; groups own tokens.
template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) unmerge_kernel(const MergeParams p) {
  const int64_t g = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  if (g >= int64_t(p.batch) * p.tokens) return;
  const int sample = int(g / p.tokens), token = int(g % p.tokens), slot = p.token_map[g];
  for (int c = int(threadIdx.x % kGroup) * kVector; c < p.width; c += kGroup * kVector) {
    float x[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = p.fill;
    if (slot < p.slots) load<T, kVector>(row_of<T>(p.y, sample, slot) + c, x);
    store<T, kVector>(row_of<T>(p.x, sample, token) + c, x);
  }
}

enum class Work { merge, backward, unmerge };

template <Work kWork, class T, int kVector, int kGroup>
void start(const MergeParams& p, void* stream) {
  const int owners = kWork == Work::merge ? p.slots : kWork == Work::backward ? p.slots + 1 : p.tokens;
  const int64_t blocks = (int64_t(p.batch) * owners * kGroup + kThreads - 1) / kThreads;
  if constexpr (kWork == Work::merge)
    launch("merge_tokens", merge_kernel<T, kVector, kGroup>, blocks, kThreads, 0, stream, p);
  else if constexpr (kWork == Work::backward)
    launch("merge_tokens_backward", merge_backward_kernel<T, kVector, kGroup>, blocks, kThreads, 0, stream, p);
  else
    launch("unmerge_tokens", unmerge_kernel<T, kVector, kGroup>, blocks, kThreads, 0, stream, p);
}

// A warp per row where one pass of it covers the row, else a block.
template <Work kWork, class T>
void start_for(const MergeParams& p, void* stream) {
  constexpr int kVector = Words<T>::kCount;
  const bool narrow = p.width <= 32 * (p.vector ? kVector : 1);
  if (p.vector) return narrow ? start<kWork, T, kVector, 32>(p, stream) : start<kWork, T, kVector, kThreads>(p, stream);
  return narrow ? start<kWork, T, 1, 32>(p, stream) : start<kWork, T, 1, kThreads>(p, stream);
}

template <Work kWork>
void start_typed(const MergeParams& p, void* stream) {
  if (p.type == TokenType::float32) return start_for<kWork, float>(p, stream);
  if (p.type == TokenType::bfloat16) return start_for<kWork, Bf16>(p, stream);
  return start_for<kWork, Half>(p, stream);
}

}  // namespace

void token_merge(const MergeParams& p, void* stream) { start_typed<Work::merge>(p, stream); }
void token_merge_backward(const MergeParams& p, void* stream) { start_typed<Work::backward>(p, stream); }
void token_unmerge(const MergeParams& p, void* stream) { start_typed<Work::unmerge>(p, stream); }

}  // namespace vitkern
