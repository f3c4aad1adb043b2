// What the kernels of linear attention share: where tokens lie, features, products in pairs of tf32 numbers.
#pragma once
#include <math.h>

#include "linear_attention.h"
#include "tiles.cuh"

namespace vitkern {

// The first token of a sequence, and from there the tokens [start, stop) of one of its runs of whole tiles.
struct Run {
  int first, start, stop;
};

__device__ __forceinline__ int within(int x, int most) { return min(max(x, 0), most); }

__device__ __forceinline__ Run run_of(const TokenAxis& axis, int sequence, int part, int parts) {
  Run r{0, 0, 0};
  int count = axis.tokens;
  if (axis.bounds != nullptr) {
    r.first = within(axis.bounds[sequence], axis.tokens);
    count = max(within(axis.bounds[sequence + 1], axis.tokens) - r.first, 0);
  }
  const int tiles = (count + kLinearTile - 1) / kLinearTile, each = (tiles + parts - 1) / parts;
  r.start = min(part * each * kLinearTile, count);
  r.stop = min(r.start + each * kLinearTile, count);
  return r;
}

// Offsets: of a sequence and head, and from there of a token.
__device__ __forceinline__ int64_t head_offset(const LinearParams& p, const SequenceView& x, int sequence, int head) {
  const int window = sequence / p.columns, column = p.queries.bounds != nullptr ? 0 : sequence % p.columns;
  return window / p.rows * x.stride[0] + window % p.rows * x.stride[1] + column * x.stride[3] + head * x.stride[5];
}
__device__ __forceinline__ int64_t token_offset(const TokenAxis& axis, const SequenceView& x, int token) {
  return token / axis.side * x.stride[2] + token % axis.side * x.stride[4];
}

// The map of each x, in place; of silu_norm SiLU(x) + 1/2, not yet divided by its norm.
template <int kCount>
__device__ __forceinline__ void features(const LinearParams& p, float (&x)[kCount]) {
  switch (p.map) {
    case FeatureMap::relu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] <= 0.0f ? 0.0f : x[i];
      break;
    case FeatureMap::elu1:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] > 0.0f ? x[i] + 1.0f : exp2_approx(x[i] * kLog2E);
      break;
    case FeatureMap::leaky_relu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] > 0.0f ? x[i] : 0.01f * x[i];
      break;
    case FeatureMap::exp:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = exp2_approx(x[i] * (p.rate * kLog2E));
      break;
    case FeatureMap::silu_norm:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] / (1.0f + exp2_approx(-x[i] * kLog2E)) + 0.5f;
      break;
    case FeatureMap::identity:
      break;
  }
}

// Whether the features of elements of 16 bits are tf32 numbers themselves.
__device__ __forceinline__ bool exact_features(const LinearParams& p) {
  return p.map == FeatureMap::relu || p.map == FeatureMap::identity;
}

// x as the sum of two tf32 numbers, but for 2^-22 of it. Of NaN and infinity `low` is NaN and 0.
struct Pair {
  uint32_t high, low;
};
__device__ __forceinline__ Pair pair_of(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000u) & ~0x1FFFu;
  const float of_high = __uint_as_float(high);
  return {high, __float_as_uint(x == of_high ? 0.0f : x - of_high)};
}

constexpr int kAddAtOnce = 8;  // loads under way in a thread that adds sums of runs

// kWidth channels: D and Dv at most.
template <int kWidth_>
struct Tile {
  static constexpr int kWidth = kWidth_;
  static constexpr int kRowBytes = 2 * kWidth + 16;  // 16 bytes of padding keep load_matrix free of bank conflicts
  static constexpr int kGroups = kWidth / 8;         // groups of 8 channels
  // keys: a warp owns 16 features of S and all values, in narrow tiles two warps share the tokens
  static constexpr int kFeatureWarps = kWidth / 16, kTokenWarps = kWidth == 32 ? 2 : 1;
  static constexpr int kKeyThreads = 32 * kFeatureWarps * kTokenWarps;
  static constexpr int kKeyStages = kWidth == 128 ? 2 : 3;
  static constexpr int kMatrixBytes = kLinearTile * kRowBytes;
  static constexpr int kKeyStageBytes = 2 * kMatrixBytes + 12 * kLinearTile;  // rows | rows | factors of each token
  static constexpr int kKeyBytes = kKeyStages * kKeyStageBytes;
  // queries: a warp owns 16 tokens
  static constexpr int kQueryThreads = 2 * kLinearTile, kPitch = kWidth + 4;  // floats of a row of S
  static constexpr int kSums = (kWidth * kPitch + 2 * kWidth + 4) * 4;        // S | z | the values | their number
  static constexpr int kQueryBytes = kSums + 2 * kMatrixBytes;  // two stages, or two matrices
  static constexpr int kBlocks = kWidth == 32 ? 6 : kWidth == 64 ? 4 : 2;  // on a multiprocessor
  static constexpr int kGradientBlocks = kWidth == 32 ? 4 : kWidth == 64 ? 3 : 1;
};

// Four floats of the sum over `count` slots that lie `apart` floats from each other.
__device__ __forceinline__ float4 add_slots(const float* slot, int64_t apart, int count) {
  float4 total = *reinterpret_cast<const float4*>(slot);
#pragma unroll kAddAtOnce
  for (int i = 1; i < count; ++i) {
    const float4 x = *reinterpret_cast<const float4*>(slot + i * apart);
    total.x += x.x;
    total.y += x.y;
    total.z += x.z;
    total.w += x.w;
  }
  return total;
}

// S | z | the values | their number of a key head in shared memory; one block of each key head also writes its state.
template <class S>
__device__ __forceinline__ void load_sums(const LinearParams& p, int unit, int splits, bool writes, float* s) {
  const int words = p.e / 4 + 1;
  float *z = s + S::kWidth * S::kPitch, *values = z + S::kWidth;
  const int64_t apart = int64_t(p.sequences) * (p.heads / p.group) * p.slot;
  const float* slot = p.parts + unit * p.slot;
  for (int i = threadIdx.x; i < (p.d + 1) * words; i += S::kQueryThreads) {
    const int row = i / words, column = i % words * 4;
    const float4 sum = add_slots(slot + i * 4, apart, splits);
    if (row < p.d && column < p.e) *reinterpret_cast<float4*>(s + row * S::kPitch + column) = sum;
    else if (row < p.d) z[row] = sum.x;
    else if (column < p.e) *reinterpret_cast<float4*>(values + column) = sum;
    else values[S::kWidth] = sum.x;
    if (!writes) continue;
    float* state = p.state + (unit * int64_t(p.d + 1) + row) * (p.e + 1) + column;
    state[0] = sum.x;
    if (column < p.e) state[1] = sum.y, state[2] = sum.z, state[3] = sum.w;
  }
}

// o = num of_num + V of_values; 0 where the divisor is 0. The gradient of the dot product of features and z is
// <dout, o>, or <dout, V> of `subtract`, times of_dot.
struct Factors {
  float of_num, of_values, of_dot;
};
__device__ __forceinline__ Factors factors_of(const LinearParams& p, float dot, float n) {
  const float den = dot * p.scale + p.offset * n;
  if (p.divisor == Divisor::none) return {p.scale, p.offset, 0.0f};
  if (p.divisor == Divisor::subtract) {
    const float count = fmaxf(n, 1.0f);
    return {p.scale / count, p.offset / count + (1.0f - den / count) / count, -p.scale / (count * count)};
  }
  float divisor = den + p.eps, sign = 1.0f;
  if (p.divisor == Divisor::mean) divisor = den + n * p.eps;
  if (p.divisor == Divisor::max) {
    divisor = den > p.eps ? den : p.eps;
    sign = den > p.eps;
  }
  if (p.divisor == Divisor::abs_max) {
    divisor = fabsf(den) > p.eps ? fabsf(den) : p.eps;
    sign = fabsf(den) > p.eps ? (den < 0.0f ? -1.0f : 1.0f) : 0.0f;
  }
  if (divisor == 0.0f) return {0.0f, 0.0f, 0.0f};
  return {p.scale / divisor, p.offset / divisor, -sign * (p.scale / divisor)};
}

// Starts to load the 16 rows of this warp in a tile: zeros past the run, and where a mask hides.
template <class S>
__device__ __forceinline__ void load_rows(const TokenAxis& axis, const SequenceView& x, int64_t at, const Run& run,
                                          int tile, int width, unsigned char* rows, const Lane& me,
                                          const SequenceView* mask = nullptr, int64_t mask_at = 0) {
  const int first = run.start + tile * kLinearTile;
  if (first >= run.stop) return;
  for (int i = me.lane; i < 16 * S::kGroups; i += 32) {
    const int row = i / S::kGroups, chunk = i % S::kGroups, t = first + me.warp * 16 + row, token = run.first + t;
    if (chunk * 8 >= width) continue;
    bool real = t < run.stop;
    if (real && mask != nullptr && mask->data != nullptr)
      real = static_cast<const uint8_t*>(mask->data)[mask_at + token_offset(axis, *mask, token)] != 0;
    const uint16_t* source = static_cast<const uint16_t*>(x.data) + at + token_offset(axis, x, token) + chunk * 8;
    load_chunk(rows + row * S::kRowBytes + chunk * 16, real ? source : nullptr, x.vector);
  }
}

// Stores them: a lane the chunks that it loads.
template <class S>
__device__ __forceinline__ void store_rows(const TokenAxis& axis, const SequenceView& x, int64_t at, const Run& run,
                                           int tile, int width, const unsigned char* rows, const Lane& me) {
  for (int i = me.lane; i < 16 * S::kGroups; i += 32) {
    const int row = i / S::kGroups, chunk = i % S::kGroups, t = run.start + tile * kLinearTile + me.warp * 16 + row;
    if (chunk * 8 >= width || t >= run.stop) continue;
    uint16_t* target = static_cast<uint16_t*>(x.data) + at + token_offset(axis, x, run.first + t) + chunk * 8;
    store_chunk(target, rows + row * S::kRowBytes + chunk * 16, x.vector);
  }
}

// The two words of the fragment of a warp's 16 rows whose channels are 8 n + 2 t and the next: rows g and g + 8.
template <class S>
__device__ __forceinline__ uint32_t& word_of(unsigned char* rows, int n, int half, const Lane& me) {
  return *reinterpret_cast<uint32_t*>(rows + (me.g + 8 * half) * S::kRowBytes + n * 16 + me.t * 4);
}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// The products of the features of a warp's 16 rows with S, and with z, of which two rows lie in a lane; `dot` is divided
// by the norm of the features, and so is what the products are to be multiplied with: `inverse`.
template <class T, class S>
__device__ __forceinline__ void multiply_features(const LinearParams& p, const unsigned char* q, const float* s,
                                                  const Lane& me, float (&num)[S::kGroups][4], float (&dot)[2],
                                                  float (&inverse)[2]) {
  const float* z = s + S::kWidth * S::kPitch;
  const bool exact = exact_features(p);
  float squares[2] = {};
#pragma unroll 1
  for (int step = 0; step * 16 < p.d; ++step) {
    uint32_t pairs[4];
    load_matrix_x4(pairs, q + (me.lane & 15) * S::kRowBytes + (me.lane >> 4) * 16 + step * 32);
    // a[4 j + h + 2 i]: of row g + 8 h feature 8 j + 2 t + i. The products take features 2 t, 2 t + 1 for t, t + 4.
    float a[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack2<T>(pairs[i]);
      a[i / 2 * 4 + i % 2] = two.x;
      a[i / 2 * 4 + i % 2 + 2] = two.y;
    }
    features(p, a);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int feature = step * 16 + 8 * j + 2 * me.t;
      if (step * 16 + 8 * j >= p.d) break;
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = a[4 * j + i];
        dot[i % 2] += x * z[feature + i / 2];
        squares[i % 2] += x * x;
        const Pair pair = pair_of(x);
        high[i] = pair.high;
        low[i] = pair.low;
      }
#pragma unroll
      for (int n = 0; n < S::kGroups; ++n) {
        if (n * 8 >= p.e) break;
        const float* column = s + feature * S::kPitch + n * 8 + me.g;
        const Pair first = pair_of(column[0]), second = pair_of(column[S::kPitch]);
        mma_16x8x8_tf32(num[n], high, first.high, second.high);
        mma_16x8x8_tf32(num[n], high, first.low, second.low);
        if (!exact) mma_16x8x8_tf32(num[n], low, first.high, second.high);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    inverse[h] = p.map == FeatureMap::silu_norm ? 1.0f / sqrtf(row_sum(squares[h])) : 1.0f;
    dot[h] = row_sum(dot[h]) * inverse[h];
  }
}

// g += the products of a warp's 16 rows y with the rows of S: [16, d].
template <class T, class S>
__device__ __forceinline__ void multiply_values(const LinearParams& p, const unsigned char* y, const float* s,
                                                const Lane& me, float (&g)[S::kGroups][4]) {
#pragma unroll 1
  for (int step = 0; step * 16 < p.e; ++step) {
    uint32_t pairs[4];
    load_matrix_x4(pairs, y + (me.lane & 15) * S::kRowBytes + (me.lane >> 4) * 16 + step * 32);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int value = step * 16 + 8 * j;
      if (value >= p.e) break;
      const float2 low = unpack2<T>(pairs[2 * j]), high = unpack2<T>(pairs[2 * j + 1]);
      const uint32_t a[4] = {__float_as_uint(low.x), __float_as_uint(high.x), __float_as_uint(low.y),
                             __float_as_uint(high.y)};
#pragma unroll
      for (int n = 0; n < S::kGroups; ++n) {
        if (n * 8 >= p.d) break;
        const float2 two = *reinterpret_cast<const float2*>(s + (n * 8 + me.g) * S::kPitch + value + 2 * me.t);
        const Pair first = pair_of(two.x), second = pair_of(two.y);
        mma_16x8x8_tf32(g[n], a, first.high, second.high);
        mma_16x8x8_tf32(g[n], a, first.low, second.low);
      }
    }
  }
}

// The gradient of x where g is that of its feature; of silu_norm `inverse` is 1 over the norm of the features, `along`
// the product of all features with their gradients.
__device__ __forceinline__ float feature_gradient(const LinearParams& p, float x, float g, float inverse, float along) {
  switch (p.map) {
    case FeatureMap::relu: return x > 0.0f ? g : 0.0f;
    case FeatureMap::elu1: return x > 0.0f ? g : g * exp2_approx(x * kLog2E);
    case FeatureMap::leaky_relu: return x > 0.0f ? g : 0.01f * g;
    case FeatureMap::exp: return p.rate * exp2_approx(x * (p.rate * kLog2E)) * g;
    case FeatureMap::silu_norm: {
      const float gate = 1.0f / (1.0f + exp2_approx(-x * kLog2E));
      return (g - (x * gate + 0.5f) * inverse * along) * inverse * (gate * (1.0f + x * (1.0f - gate)));
    }
    default: return g;
  }
}

// The products of the features of a warp's rows g and g + 8 with their gradients.
template <class T, class S>
__device__ __forceinline__ void features_by_gradients(const LinearParams& p, unsigned char* rows, const Lane& me,
                                                      const float (&g)[S::kGroups][4], const float (&inverse)[2],
                                                      float (&along)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    along[h] = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kGroups; ++n) {
      if (n * 8 >= p.d) break;
      const float2 two = unpack2<T>(word_of<S>(rows, n, h, me));
      float x[2] = {two.x, two.y};
      features(p, x);
      along[h] += x[0] * g[n][2 * h] + x[1] * g[n][2 * h + 1];
    }
    along[h] = row_sum(along[h]) * inverse[h];
  }
}

// The gradients of a warp's rows in place of the rows, rounded to T.
template <class T, class S>
__device__ __forceinline__ void put_gradients(const LinearParams& p, unsigned char* rows, const Lane& me,
                                              const float (&g)[S::kGroups][4], const float (&inverse)[2],
                                              const float (&along)[2]) {
#pragma unroll
  for (int n = 0; n < S::kGroups; ++n) {
    if (n * 8 >= p.d) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t& word = word_of<S>(rows, n, h, me);
      const float2 x = unpack2<T>(word);
      word = pack2<T>(feature_gradient(p, x.x, g[n][2 * h], inverse[h], along[h]),
                      feature_gradient(p, x.y, g[n][2 * h + 1], inverse[h], along[h]));
    }
  }
}

}  // namespace vitkern
