// The backward of window attention: how many blocks, what each leaves behind in scratch, and steps on its fragments.
//
// Scratch, in floats:  runs x key heads x record | dense dbias [H, N, N] | sums over the group, [windows, Hk, 2, tile]
#pragma once
#include "window_attention.cuh"

namespace vitkern {

template <class S>
struct BackwardPlan {
  // Per multiprocessor: what registers and, on Hopper and Blackwell, shared memory allow.
  static constexpr int kBlocks = S::kWidth == 128 ? 1 : S::kWidth == 64 ? 2 : S::kTiles >= 7 ? 3 : 5;
};

// Runs of windows: what the GPU holds at a time, at least one window each.
inline int64_t backward_runs(int64_t kv_heads, int64_t windows, int blocks) {
  const int64_t room = int64_t(multiprocessors()) * blocks / kv_heads;
  const int64_t most = room < 1 ? 1 : room;
  const int64_t per_run = (windows + most - 1) / most;
  return windows == 0 ? 0 : (windows + per_run - 1) / per_run;
}

// The record of one block. Per head of the group: dbias in fragment order [kTiles][threads][4], then at `tau` one
// float per warp; after all heads, at `pads`, dk_pad [D] and dv_pad [Dv].
struct BackwardRecord {
  int64_t floats, head_floats, tau, pads, dense_floats;
  int32_t warps, tiles;
};

VITKERN_HD BackwardRecord backward_record(const WindowParams& w, int tiles) {
  BackwardRecord r;
  r.warps = (w.map.size + 15) / 16;
  r.tiles = tiles;
  r.tau = int64_t(tiles) * r.warps * 32 * 4;
  r.head_floats = r.tau + 4;
  r.pads = w.group * r.head_floats;
  r.floats = r.pads + w.d + w.dv;
  r.dense_floats = (int64_t(w.heads) * w.map.size * w.map.size + 3) / 4 * 4;
  return r;
}

// The gradient of x from that of x^ = x / max(|x|, eps), for the rows g and g + 8; `unit` is the matrix of x^.
template <class T, class S>
__device__ __forceinline__ void undo_normalize(float (&c)[S::kWidth / 8][4], const unsigned char* unit,
                                               const float* inverse_norm, const Lane& me) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = me.warp * 16 + me.g + half * 8;
    const unsigned char* words = unit + row * S::kRowBytes + me.t * 4;
    const float inverse = inverse_norm[row];
    float dot = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kWidth / 8; ++n) {
      const float2 x = unpack2<T>(*reinterpret_cast<const uint32_t*>(words + n * 16));
      dot += x.x * c[n][2 * half] + x.y * c[n][2 * half + 1];
    }
    dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 1);
    dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 2);
    if (inverse < 0.0f) dot = 0.0f;  // the norm was replaced by eps, a constant
#pragma unroll
    for (int n = 0; n < S::kWidth / 8; ++n) {
      const float2 x = unpack2<T>(*reinterpret_cast<const uint32_t*>(words + n * 16));
      c[n][2 * half] = (c[n][2 * half] - x.x * dot) * fabsf(inverse);
      c[n][2 * half + 1] = (c[n][2 * half + 1] - x.y * dot) * fabsf(inverse);
    }
  }
}

// Where an own row sees a value that is not finite, its output is NaN whatever the weights: its gradient there counts
// for nothing. Zeroes these elements of the own rows of dO; `v_row` is transposed_row(V).
template <class T, class S>
__device__ __forceinline__ void drop_broken_outputs(unsigned char* dout, const unsigned char* v_row, int width,
                                                    uint32_t hidden, const Lane& me) {
  const auto seen = [&](int step, uint32_t(&a)[4]) { seen_keys<T>(hidden, step, a); };
#pragma unroll 1
  for (int pair = 0; pair < S::kWidth / 16; ++pair) {
    if (pair * 16 >= width) break;
    float bad[2][4];
    weigh_values<T, S, Values::not_finite>(bad, v_row + pair * 32, seen);
    uint16_t* row = reinterpret_cast<uint16_t*>(dout + fragment_row(me, 0) * S::kRowBytes) + pair * 16 + me.t * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (bad[i / 4][i % 4] > 0.0f) row[i % 4 / 2 * 4 * S::kRowBytes + i / 4 * 8 + i % 2] = 0;
  }
  __syncwarp();
}

// Adds the rows of pads to the sums of this warp, [kWidth].
template <class S>
__device__ __forceinline__ void add_pads(const float (&c)[S::kWidth / 8][4], const uint8_t* info, int tokens,
                                         float* sums, const Lane& me) {
  const int row = fragment_row(me, 0);
  const bool low = row < tokens && info[row] & kPadBit, high = row + 8 < tokens && info[row + 8] & kPadBit;
#pragma unroll
  for (int n = 0; n < S::kWidth / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = (low ? c[n][i] : 0.0f) + (high ? c[n][i + 2] : 0.0f);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 8);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 16);
      if (me.g == 0) sums[n * 8 + me.t * 2 + i] += sum;
    }
}

// With grouped queries dk and dv of a window are summed over the heads of the group in float32 scratch: every thread
// reads back what it wrote itself. True when the sum is complete.
template <class S>
__device__ __forceinline__ bool add_group(float (&c)[S::kWidth / 8][4], const WindowParams& w, int member,
                                          float* scratch) {
  float4* own = reinterpret_cast<float4*>(scratch) + threadIdx.x;
#pragma unroll
  for (int n = 0; n < S::kWidth / 8; ++n) {
    const float4 x = member > 0 ? own[n * S::kThreads] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    c[n][0] += x.x;
    c[n][1] += x.y;
    c[n][2] += x.z;
    c[n][3] += x.w;
    if (member + 1 < w.group) own[n * S::kThreads] = make_float4(c[n][0], c[n][1], c[n][2], c[n][3]);
  }
  return member + 1 == w.group;
}

// Adds the records of all blocks in a fixed order and writes dbias, dlogit_scale, dk_pad and dv_pad.
void reduce_partials(const WindowBackwardParams& p, const BackwardRecord& record, void* stream);

}  // namespace vitkern
