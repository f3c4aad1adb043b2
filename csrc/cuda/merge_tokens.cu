// merge_tokens and unmerge_tokens: a group of threads, a warp or a block, owns a slot (or, to unmerge, a token) and
// walks its tokens in the order of the plan; each thread owns channels. Nothing is added across threads but the inner
// products that the weights' gradients need, in a fixed order. reduce="mlerp" is in merge_tokens_mlerp.cu.
#include "merge_tokens.cuh"

namespace vitkern {
namespace {

template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks) merge_kernel(const MergeParams p) {
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
      inner = group_sum<kGroup>(inner, reinterpret_cast<float*>(dynamic_shared()));
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
__global__ void __launch_bounds__(kThreads, kBlocks) merge_backward_kernel(const MergeParams p) {
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
    float dy[kVector] = {}, best[kVector] = {}, ties[kVector] = {}, x[kVector];
    if (!nothing) load<T, kVector>(row_of<T>(p.dy, s.sample, s.slot) + c, dy);
    if (p.reduce == TokenReduce::max && !nothing) {  // dy over the number of tokens that attain the maximum
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
__global__ void __launch_bounds__(kThreads, kBlocks) unmerge_kernel(const MergeParams p) {
  const int64_t g = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  if (g >= int64_t(p.batch) * p.tokens) return;
  const int sample = int(g / p.tokens), token = int(g % p.tokens), slot = p.token_map[g];
  for (int c = int(threadIdx.x % kGroup) * kVector; c < p.width; c += kGroup * kVector) {
    float x[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = p.fill;
    if (slot >= 0 && slot < p.slots) load<T, kVector>(row_of<T>(p.y, sample, slot) + c, x);
    store<T, kVector>(row_of<T>(p.x, sample, token) + c, x);
  }
}

enum class Work { merge, backward, unmerge };

template <Work kWork>
struct Start {
  template <class T, int kVector, int kGroup>
  static void run(const MergeParams& p, void* stream) {
    constexpr int words = kThreads / 32 * int(sizeof(float));
    const int owners = kWork == Work::merge ? p.slots : kWork == Work::backward ? p.slots + 1 : p.tokens;
    const int64_t blocks = blocks_for<kGroup>(p, owners);
    if constexpr (kWork == Work::merge)
      launch("merge_tokens", merge_kernel<T, kVector, kGroup>, blocks, kThreads, 0, stream, p);
    else if constexpr (kWork == Work::backward)
      launch("merge_tokens_backward", merge_backward_kernel<T, kVector, kGroup>, blocks, kThreads, words, stream, p);
    else
      launch("unmerge_tokens", unmerge_kernel<T, kVector, kGroup>, blocks, kThreads, 0, stream, p);
  }
};

}  // namespace

void token_merge(const MergeParams& p, void* stream) {
  if (p.reduce == TokenReduce::mlerp) token_mlerp(p, stream);
  else start_typed<Start<Work::merge>>(p, stream);
}
void token_merge_backward(const MergeParams& p, void* stream) {
  if (p.reduce == TokenReduce::mlerp) token_mlerp_backward(p, stream);
  else start_typed<Start<Work::backward>>(p, stream);
}
void token_unmerge(const MergeParams& p, void* stream) { start_typed<Start<Work::unmerge>>(p, stream); }

}  // namespace vitkern
