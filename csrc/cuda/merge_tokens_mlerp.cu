// merge_tokens with reduce="mlerp": the weighted mean of a slot, as long as its longest token. Groups of threads own slots
// as in merge_tokens.cu. The mean stays in shared memory in float32, where each thread writes and reads its own channels.
#include "merge_tokens.cuh"

namespace vitkern {
namespace {

constexpr float kLeastLength = 1e-12f;  // of a mean that is divided by

// Floats of shared memory for a row, whole passes of the group.
template <int kVector, int kGroup>
__host__ __device__ __forceinline__ int row_floats(int width) {
  constexpr int pass = kVector * kGroup;
  return (width + pass - 1) / pass * pass;
}

// Where channel c + v of this thread's row stands: neighbours of a lane are kGroup apart, lanes side by side.
template <int kVector, int kGroup>
__device__ __forceinline__ int place_of(const Slot& s, int c, int v) {
  return c - s.lane * kVector + v * kGroup + s.lane;
}

struct Mean {
  float* row;      // the mean, through place_of
  float length;    // its norm
  float longest;   // the largest norm of a token of the slot
  int leader;      // the first place that has it
};

__device__ __forceinline__ float divisor(float length) { return length <= kLeastLength ? kLeastLength : length; }

template <class T, int kVector, int kGroup>
__device__ __forceinline__ Mean mean_of(const MergeParams& p, const Slot& s, float total) {
  float* words = reinterpret_cast<float*>(dynamic_shared());
  const int group = int(threadIdx.x) / kGroup;
  Mean m{words + kThreads / 32 + group * row_floats<kVector, kGroup>(p.width), 0.0f, 0.0f, s.first};
  float squares = 0.0f;
  for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
    float mean[kVector] = {}, x[kVector];
    for (int i = s.first; i < s.end; ++i) {
      const int token = token_at(p, s, i);
      const float w = weight_of(p, s, token);
      load<T, kVector>(row_of<T>(p.x, s.sample, token) + c, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) mean[v] += w * x[v];
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      mean[v] = total == 0.0f ? 0.0f : mean[v] / total;
      m.row[place_of<kVector, kGroup>(s, c, v)] = mean[v];
      squares += mean[v] * mean[v];
    }
  }
  m.length = sqrtf(group_sum<kGroup>(squares, words));
  for (int i = s.first; i < s.end; ++i) {
    const T* row = row_of<T>(p.x, s.sample, token_at(p, s, i));
    squares = 0.0f;
    for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
      float x[kVector];
      load<T, kVector>(row + c, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) squares += x[v] * x[v];
    }
    const float norm = sqrtf(group_sum<kGroup>(squares, words));
    if (norm > m.longest || norm != norm) m.longest = norm, m.leader = i;
  }
  return m;
}

template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks) mlerp_kernel(const MergeParams p) {
  const Slot s = slot_of<kGroup>(p, p.slots);
  if (!s.exists) return;
  const float total = total_weight(p, s);
  if (s.lane == 0) p.size[int64_t(s.sample) * p.slots + s.slot] = total;
  const Mean m = mean_of<T, kVector, kGroup>(p, s, total);
  const float scale = m.longest / divisor(m.length);
  for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
    float y[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) y[v] = m.row[place_of<kVector, kGroup>(s, c, v)] * scale;
    store<T, kVector>(row_of<T>(p.y, s.sample, s.slot) + c, y);
  }
}

// With u the mean, M the longest length and a = <dy, u> / |u|, the mean's gradient is g = M / |u| (dy - a u / |u|), where
// |u| is at least kLeastLength and the second term is absent if it is not more. dx_i = w_i g / W, and the longest token
// gets a x_i / M besides; dweight_i = <g, x_i - u> / W + dsize.
template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks) mlerp_backward_kernel(const MergeParams p) {
  const Slot s = slot_of<kGroup>(p, p.slots + 1);
  if (!s.exists) return;
  float* words = reinterpret_cast<float*>(dynamic_shared());
  const bool dropped = s.slot == p.slots, nothing = dropped || p.dy.data == nullptr;
  const float total = dropped ? 0.0f : total_weight(p, s);
  const float of_size = dropped || p.dsize == nullptr ? 0.0f : p.dsize[int64_t(s.sample) * p.slots + s.slot];
  Mean m{};
  float of_leader = 0.0f, along_mean = 0.0f;
  if (!nothing) {
    m = mean_of<T, kVector, kGroup>(p, s, total);
    const T* gradient = row_of<T>(p.dy, s.sample, s.slot);
    float inner = 0.0f, dy[kVector];
    for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
      load<T, kVector>(gradient + c, dy);
#pragma unroll
      for (int v = 0; v < kVector; ++v) inner += dy[v] * m.row[place_of<kVector, kGroup>(s, c, v)];
    }
    const float length = divisor(m.length), along = group_sum<kGroup>(inner, words) / length;
    const float scale = m.longest / length, back = m.length <= kLeastLength ? 0.0f : along / length;
    of_leader = m.longest == 0.0f ? 0.0f : along / m.longest;
    inner = 0.0f;
    for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {  // g takes the place of u
      load<T, kVector>(gradient + c, dy);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float& at = m.row[place_of<kVector, kGroup>(s, c, v)];
        const float u = at;
        at = scale * (dy[v] - back * u);
        inner += at * u;
      }
    }
    along_mean = group_sum<kGroup>(inner, words);
  }
  for (int i = s.first; i < s.end; ++i) {
    const int token = token_at(p, s, i);
    const float share = total == 0.0f ? 0.0f : weight_of(p, s, token) / total;
    float inner = 0.0f;
    for (int c = s.lane * kVector; c < p.width; c += kGroup * kVector) {
      float dx[kVector] = {}, x[kVector];
      if (!nothing) {
        load<T, kVector>(row_of<T>(p.x, s.sample, token) + c, x);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float g = m.row[place_of<kVector, kGroup>(s, c, v)];
          inner += g * x[v];
          dx[v] = share * g + (i == m.leader ? of_leader * x[v] : 0.0f);
        }
      }
      if (p.dx.data != nullptr) store<T, kVector>(row_of<T>(p.dx, s.sample, token) + c, dx);
    }
    if (p.dweight == nullptr) continue;
    inner = group_sum<kGroup>(inner, words);
    const float of_mean = nothing || total == 0.0f ? 0.0f : (inner - along_mean) / total;
    if (s.lane == 0) p.dweight[int64_t(s.sample) * p.tokens + token] = of_mean + of_size;
  }
}

template <bool kBackward>
struct Start {
  template <class T, int kVector, int kGroup>
  static void run(const MergeParams& p, void* stream) {
    const int rows = kThreads / kGroup * row_floats<kVector, kGroup>(p.width);
    const int bytes = (kThreads / 32 + rows) * int(sizeof(float));
    if constexpr (kBackward)
      launch("merge_tokens_mlerp_backward", mlerp_backward_kernel<T, kVector, kGroup>, blocks_for<kGroup>(p, p.slots + 1),
             kThreads, bytes, stream, p);
    else
      launch("merge_tokens_mlerp", mlerp_kernel<T, kVector, kGroup>, blocks_for<kGroup>(p, p.slots), kThreads, bytes,
             stream, p);
  }
};

}  // namespace

void token_mlerp(const MergeParams& p, void* stream) { start_typed<Start<false>>(p, stream); }
void token_mlerp_backward(const MergeParams& p, void* stream) { start_typed<Start<true>>(p, stream); }

}  // namespace vitkern
