// bipartite_match: the most similar destination of every source, without a matrix of similarities.
//
// A block of four warps keeps 64 sources and streams the destinations past them, 64 at a time. A warp multiplies 16
// sources with a tile: half-precision metrics on the tensor cores (their products are exact in tf32, sums are float32),
// others in float32. Behind the product each lane scales by the destination's inverse norm and keeps the best of its
// columns, in ascending positions, so that ties go to the smallest; four lanes share a row and compare at the end.
#include <math.h>

#include "tokens.cuh"

namespace vitkern {
namespace {

constexpr int kThreads = 128, kTile = 64, kChunk = 32, kPitch = kChunk + 4;  // the pitch spreads rows over the banks
constexpr int kResidentWidth = 256;  // up to here the sources stay in shared memory

struct MatchShared {  // the sources follow: a chunk each where they stay, else one chunk
  float destinations[kTile][kPitch];
  float inverse[kTile];            // of a destination's norm; NaN: it matches nothing
  int32_t columns[kTile + kThreads];  // positions of destinations that were found, the first kTile are the tile
  uint32_t votes[kThreads / 32];
};
using Rows = float[kTile][kPitch];

__device__ __forceinline__ int role_of(const MatchParams& p, int sample, int position) {
  if (p.role != nullptr) return p.role[sample * p.role_batch + position];
  return position < p.protect ? int(kProtected) : position % 2;
}

// Sixteen elements of a row from `first` on, averaged over the heads; zeros past the width and for no row.
template <class T>
__device__ __forceinline__ void load_row(const MatchParams& p, int sample, int position, int first, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = 0.0f;
  if (position < 0) return;
  const T* row = static_cast<const T*>(p.metric) + sample * p.batch_stride + position * p.token_stride + first;
  const int count = min(16, p.width - first);
  for (int head = 0; head < p.heads; ++head, row += p.head_stride) {
    if (count == 16 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < 16; i += Words<T>::kCount) {
        float words[Words<T>::kCount];
        Words<T>::load(row + i, words);
#pragma unroll
        for (int j = 0; j < Words<T>::kCount; ++j) x[i + j] += words[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (i < count) x[i] += load_one<T>(row + i);
    }
  }
  if (p.heads > 1)
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] /= float(p.heads);
}

// One half of a row of a chunk into shared memory; adds up its squares, a NaN or infinity makes `broken` true.
template <class T>
__device__ __forceinline__ void stage(const MatchParams& p, int sample, int position, int chunk,
                                      Rows& rows, float& squares, bool& broken) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2 * 16;
  float x[16];
  load_row<T>(p, sample, position, chunk * kChunk + half, x);
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    *reinterpret_cast<float4*>(&rows[row][half + i]) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      squares += x[j] * x[j];
      broken |= !(fabsf(x[j]) < INFINITY);
    }
  }
}

// The inverse norm of the row whose halves this thread and its neighbour staged; NaN for a broken row or none.
__device__ __forceinline__ float inverse_norm(const MatchParams& p, float squares, bool broken, bool exists) {
  squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 1);
  broken = __shfl_xor_sync(0xFFFFFFFFu, int(broken), 1) || broken;
  if (broken || !exists) return NAN;
  return p.cosine ? 1.0f / fmaxf(sqrtf(squares), p.eps) : 1.0f;
}

// sums[n] += the products of rows (lane / 4, + 8) of this warp's 16 sources with columns 8 n + 2 (lane % 4), + 1.
template <bool kTensorCores>
__device__ __forceinline__ void multiply(const Rows& sources, const Rows& destinations, float (&sums)[8][4]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, t = lane % 4;
  if constexpr (kTensorCores) {
#pragma unroll
    for (int k = 0; k < kChunk; k += 8) {
      const uint32_t a[4] = {__float_as_uint(sources[row][k + t]), __float_as_uint(sources[row + 8][k + t]),
                             __float_as_uint(sources[row][k + t + 4]), __float_as_uint(sources[row + 8][k + t + 4])};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float* column = &destinations[8 * n + lane / 4][k + t];
        mma_16x8x8_tf32(sums[n], a, __float_as_uint(column[0]), __float_as_uint(column[4]));
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < kChunk; k += 4) {
      const float4 low = *reinterpret_cast<const float4*>(&sources[row][k]);
      const float4 high = *reinterpret_cast<const float4*>(&sources[row + 8][k]);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 column = *reinterpret_cast<const float4*>(&destinations[8 * n + 2 * t + e][k]);
          sums[n][e] += low.x * column.x + low.y * column.y + low.z * column.z + low.w * column.w;
          sums[n][2 + e] += high.x * column.x + high.y * column.y + high.z * column.z + high.w * column.w;
        }
    }
  }
}

__device__ __forceinline__ bool allowed(const MatchParams& p, int sample, int source, int destination) {
  if (p.segments != nullptr) {
    const int32_t* of = p.segments + sample * p.segment_batch;
    if (of[source] != of[destination]) return false;
  }
  return in_window(p.window, source, destination);
}

// Fills the list of destinations up to a tile; returns how many it holds, at least one less than kTile + kThreads.
__device__ __forceinline__ int gather(const MatchParams& p, int sample, int have, int& cursor, MatchShared& s) {
  while (have < kTile && cursor < p.tokens) {
    const int position = cursor + int(threadIdx.x), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool found = position < p.tokens && role_of(p, sample, position) == int(kDestination);
    const uint32_t votes = __ballot_sync(0xFFFFFFFFu, found);
    if (lane == 0) s.votes[warp] = votes;
    __syncthreads();
    int place = have + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) place += __popc(s.votes[w]);
      have += __popc(s.votes[w]);
    }
    if (found) s.columns[place] = position;
    __syncthreads();
    cursor += kThreads;
  }
  return have;
}

template <class T, bool kTensorCores, bool kRestricted>
__global__ void __launch_bounds__(kThreads) match_kernel(const MatchParams p) {
  MatchShared& s = *reinterpret_cast<MatchShared*>(dynamic_shared());
  Rows* const sources = reinterpret_cast<Rows*>(dynamic_shared() + sizeof(MatchShared));
  const int step = p.role == nullptr ? 2 : 1, span = kTile * step, spans = (p.tokens + span - 1) / span;
  const int sample = blockIdx.x / spans, first = blockIdx.x % spans * span;
  const int chunks = (p.width + kChunk - 1) / kChunk;
  const bool resident = p.width <= kResidentWidth;
  const int64_t out = int64_t(sample) * p.tokens;
  const auto source_at = [&](int row) {
    const int position = first + row * step;
    return position < p.tokens && role_of(p, sample, position) == int(kSource) ? position : -1;
  };
  for (int i = first + int(threadIdx.x); i < min(first + span, p.tokens); i += kThreads) {
    const int role = role_of(p, sample, i);
    p.role_out[out + i] = int8_t(role);
    if (role != int(kSource)) {
      p.score[out + i] = -INFINITY;
      p.dst[out + i] = i;
    }
  }
  const int staged = source_at(threadIdx.x / 2), lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  if (!__syncthreads_or(staged >= 0)) return;
  const int mine[2] = {source_at(row), source_at(row + 8)};
  float best[2] = {-INFINITY, -INFINITY}, source_inverse = 0.0f;
  int partner[2] = {-1, -1};
  int have = 0, cursor = 0;
  for (bool start = true; (have = gather(p, sample, have, cursor, s)) > 0; start = false) {
    const int filled = min(have, kTile);
    const int column = int(threadIdx.x) / 2 < filled ? s.columns[threadIdx.x / 2] : -1;
    float sums[8][4] = {}, squares = 0.0f, source_squares = 0.0f;
    bool broken = false, source_broken = false;
    for (int c = 0; c < chunks; ++c) {
      __syncthreads();  // the tile before has been read
      stage<T>(p, sample, column, c, s.destinations, squares, broken);
      if (start || !resident)
        stage<T>(p, sample, staged, c, sources[resident ? c : 0], source_squares, source_broken);
      __syncthreads();
      multiply<kTensorCores>(sources[resident ? c : 0], s.destinations, sums);
    }
    const float norm = inverse_norm(p, squares, broken, column >= 0);
    if (threadIdx.x % 2 == 0) s.inverse[threadIdx.x / 2] = norm;
    if (start) source_inverse = inverse_norm(p, source_squares, source_broken, staged >= 0);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = 8 * n + lane % 4 * 2 + e;
        const float scale = s.inverse[j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float score = sums[n][2 * h + e] * scale;
          if (score > best[h] && (!kRestricted || (mine[h] >= 0 && allowed(p, sample, mine[h], s.columns[j])))) {
            best[h] = score;
            partner[h] = s.columns[j];
          }
        }
      }
    __syncthreads();
    const int left = have - filled, moved = int(threadIdx.x) < left ? s.columns[kTile + threadIdx.x] : 0;
    __syncthreads();
    if (int(threadIdx.x) < left) s.columns[threadIdx.x] = moved;
    __syncthreads();
    have = left;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, best[h], bits);
      const int with = __shfl_xor_sync(0xFFFFFFFFu, partner[h], bits);
      if (other > best[h] || (other == best[h] && with < partner[h])) best[h] = other, partner[h] = with;
    }
  }
  // The threads 2 r and 2 r + 1 hold the norm of source r.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float scaled = best[h] * __shfl_sync(0xFFFFFFFFu, source_inverse, (lane / 4 + 8 * h) * 2);
    if (lane % 4 == 0 && mine[h] >= 0) {
      const bool found = scaled > -INFINITY;  // not for NaN
      p.score[out + mine[h]] = found ? scaled : -INFINITY;
      p.dst[out + mine[h]] = found ? partner[h] : mine[h];
    }
  }
}

template <class T>
void launch_match(const MatchParams& p, void* stream) {
  const int span = p.role == nullptr ? 2 * kTile : kTile;
  const int64_t blocks = int64_t(p.batch) * ((p.tokens + span - 1) / span);
  const int chunks = (p.width + kChunk - 1) / kChunk, kept = p.width <= kResidentWidth ? chunks : 1;
  const int shared = int(sizeof(MatchShared) + kept * sizeof(Rows));
  const bool restricted = p.segments != nullptr || p.window.axes != 0;
  auto kernel = restricted ? match_kernel<T, false, true> : match_kernel<T, false, false>;
  if constexpr (sizeof(T) == 2)
    if (p.heads == 1) kernel = restricted ? match_kernel<T, true, true> : match_kernel<T, true, false>;
  launch("bipartite_match", kernel, blocks, kThreads, shared, stream, p);
}

}  // namespace

void token_match(const MatchParams& p, void* stream) {
  if (p.type == TokenType::float32) return launch_match<float>(p, stream);
  if (p.type == TokenType::bfloat16) return launch_match<Bf16>(p, stream);
  return launch_match<Half>(p, stream);
}

}  // namespace vitkern
