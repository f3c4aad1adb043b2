// Sums over runs of tokens on tensor cores: of keys forward, of queries for the gradients of the sums.
#pragma once
#include "linear_attention.cuh"

namespace vitkern {

// What the sums over queries have beside their rows: the rows of dout, three factors of each (LinearBackwardParams).
struct QuerySums {
  SequenceView dout, factors;
  int64_t apart;
};

// Starts to load a tile of rows with their factors, several threads to a row: of keys and values one factor, of queries
// and dout three. Adds the valid keys to `valid`.
template <class S, bool kQueries>
__device__ __forceinline__ void load_tokens(const LinearParams& p, const QuerySums& of, int sequence, int head,
                                            const Run& run, int tile, unsigned char* stage, int& valid) {
  constexpr int kSharing = S::kKeyThreads / kLinearTile;
  const TokenAxis& axis = kQueries ? p.queries : p.keys;
  const SequenceView &left = kQueries ? p.q : p.k, &right = kQueries ? of.dout : p.v;
  const int row = threadIdx.x / kSharing, part = threadIdx.x % kSharing, t = run.start + tile * kLinearTile + row;
  const int token = run.first + t;
  bool seen = t < run.stop;
  if (!kQueries && seen && p.mask.data != nullptr)
    seen = static_cast<const uint8_t*>(p.mask.data)[head_offset(p, p.mask, sequence, 0) +
                                                    token_offset(axis, p.mask, token)] != 0;
  const int64_t left_at = head_offset(p, left, sequence, head) + token_offset(axis, left, token);
  const int64_t right_at = head_offset(p, right, sequence, head) + token_offset(axis, right, token);
  const uint16_t *x = static_cast<const uint16_t*>(left.data), *y = static_cast<const uint16_t*>(right.data);
  for (int chunk = part; chunk * 8 < p.d; chunk += kSharing)
    load_chunk(stage + row * S::kRowBytes + chunk * 16, seen ? x + left_at + chunk * 8 : nullptr, left.vector);
  stage += S::kMatrixBytes;
  for (int chunk = part; chunk * 8 < p.e; chunk += kSharing)
    load_chunk(stage + row * S::kRowBytes + chunk * 16, seen ? y + right_at + chunk * 8 : nullptr, right.vector);
  if (part != 0) return;
  float* factors = reinterpret_cast<float*>(stage + S::kMatrixBytes) + row;
  if (kQueries) {
    const float* given = static_cast<const float*>(of.factors.data) + head_offset(p, of.factors, sequence, head) +
                         token_offset(axis, of.factors, token);
    for (int i = 0; i < 3; ++i) factors[i * kLinearTile] = seen ? given[i * of.apart] : 0.0f;
    return;
  }
  factors[0] = seen ? 1.0f : 0.0f;
  if (seen && p.weight.data != nullptr)
    factors[0] = static_cast<const float*>(p.weight.data)[head_offset(p, p.weight, sequence, head) +
                                                          token_offset(axis, p.weight, token)];
  valid += seen;
}

// Divides the factor of each key by the norm of its features.
template <class T, class S>
__device__ __forceinline__ void divide_by_norms(const LinearParams& p, unsigned char* stage) {
  constexpr int kSharing = S::kKeyThreads / kLinearTile;
  const int row = threadIdx.x / kSharing, part = threadIdx.x % kSharing;
  float squares = 0.0f;
  for (int c = 2 * part; c < p.d; c += 2 * kSharing) {
    const float2 two = unpack2<T>(*reinterpret_cast<const uint32_t*>(stage + row * S::kRowBytes + c * 2));
    float x[2] = {two.x, two.y};
    features(p, x);
    squares += x[0] * x[0] + x[1] * x[1];
  }
#pragma unroll
  for (int bits = 1; bits < kSharing; bits *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, bits);
  if (part == 0) reinterpret_cast<float*>(stage + 2 * S::kMatrixBytes)[row] /= sqrtf(squares);
}

// What a warp has summed: 16 features by kWidth values, the features, and 16 of the values.
template <class S>
struct Sums {
  float s[S::kGroups][4], z[2], values[2];
};

// Adds 16 tokens.
template <class T, class S, bool kQueries>
__device__ __forceinline__ void add_tokens(const LinearParams& p, const unsigned char* stage, int step, int of_features,
                                           bool exact, const Lane& me, Sums<S>& sums) {
  const unsigned char* v = stage + S::kMatrixBytes;
  const float* factors = reinterpret_cast<const float*>(stage + 2 * S::kMatrixBytes) + step * 16 + 2 * me.t;
  uint32_t pairs[4];
  load_matrix_x4_transposed(pairs, stage + (step * 16 + (me.lane >> 4) * 8 + (me.lane & 7)) * S::kRowBytes +
                                       of_features * 32 + (me.lane >> 3 & 1) * 16);
  // b[4 j + h + 2 i]: feature g + 8 h of token 8 j + 2 t + i. The products take tokens 2 t and 2 t + 1 for t and t + 4.
  float b[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack2<T>(pairs[i]);
    b[i / 2 * 4 + i % 2] = two.x;
    b[i / 2 * 4 + i % 2 + 2] = two.y;
  }
  features(p, b);
  uint32_t high[8], low[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* factor = factors + i / 4 * 8 + i / 2 % 2;
    if (kQueries) sums.z[i % 2] += b[i] * factor[kLinearTile];
    b[i] *= *factor;
    if (!kQueries) sums.z[i % 2] += b[i];
    const Pair pair = pair_of(b[i]);
    high[i] = pair.high;
    low[i] = pair.low;
  }
#pragma unroll
  for (int pair = 0; pair < S::kGroups / 2; ++pair) {
    if (pair * 16 >= p.e) break;
    load_matrix_x4_transposed(pairs, v + (step * 16 + (me.lane & 15)) * S::kRowBytes + pair * 32 + (me.lane >> 4) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tokens 8 (i % 2).., values 8 (i / 2)..
      const float2 two = unpack2<T>(pairs[i]);
      const uint32_t first = __float_as_uint(two.x), second = __float_as_uint(two.y);
      float(&c)[4] = sums.s[2 * pair + i / 2];
      const int at = i % 2 * 4;
      const float* factor = factors + 2 * kLinearTile + i % 2 * 8;
      if (pair == of_features)
        sums.values[i / 2] += kQueries ? two.x * factor[0] + two.y * factor[1] : two.x + two.y;
      mma_16x8x8_tf32(c, {high[at], high[at + 1], high[at + 2], high[at + 3]}, first, second);
      if (!exact) mma_16x8x8_tf32(c, {low[at], low[at + 1], low[at + 2], low[at + 3]}, first, second);
    }
  }
}

// The sums of a run of keys, or of the queries of all heads that share a key head, one head after the other. Grid:
// sequences x key heads (fastest), splits.
template <class T, class S, bool kQueries>
__global__ void __launch_bounds__(S::kKeyThreads, S::kBlocks)
    linear_sums_kernel(const LinearParams p, const QuerySums of, int splits) {
  unsigned char* shared = dynamic_shared();
  const Lane me = this_lane();
  const int of_features = me.warp % S::kFeatureWarps, of_tokens = me.warp / S::kFeatureWarps;
  const int heads = p.heads / p.group, units = p.sequences * heads;
  const int unit = blockIdx.x % units, sequence = unit / heads, head = unit % heads;
  const Run run = run_of(kQueries ? p.queries : p.keys, sequence, blockIdx.x / units, splits);
  const int of_head = (run.stop - run.start + kLinearTile - 1) / kLinearTile, tiles = kQueries ? of_head * p.group : of_head;
  const bool exact = !kQueries && exact_features(p) && p.weight.data == nullptr;
  Sums<S> sums{};
  int valid = 0;

  const auto load = [&](int tile) {
    if (tile < tiles)
      load_tokens<S, kQueries>(p, of, sequence, kQueries ? head * p.group + tile / of_head : head, run, tile % of_head,
                               shared + tile % S::kKeyStages * S::kKeyStageBytes, valid);
    copy_commit();
  };
  for (int tile = 0; tile < S::kKeyStages - 1; ++tile) load(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    unsigned char* stage = shared + tile % S::kKeyStages * S::kKeyStageBytes;
    copy_wait<S::kKeyStages - 2>();
    __syncthreads();  // this tile is complete; the one before has been read by all
    load(tile + S::kKeyStages - 1);
    if (!kQueries && p.map == FeatureMap::silu_norm) {  // of queries the factors hold the norms
      divide_by_norms<T, S>(p, stage);
      __syncthreads();  // the factors are complete
    }
    if (of_features * 16 < p.d || of_features * 16 < p.e)
      for (int step = of_tokens; step < kLinearTile / 16; step += S::kTokenWarps)
        add_tokens<T, S, kQueries>(p, stage, step, of_features, exact, me, sums);
  }

  // Lanes of equal g hold parts of the same features, lanes of equal t parts of none: of the values it is the same.
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      sums.z[i] += __shfl_xor_sync(0xFFFFFFFFu, sums.z[i], bits);
      sums.values[i] += __shfl_xor_sync(0xFFFFFFFFu, sums.values[i], bits);
    }
  valid = int(__reduce_add_sync(0xFFFFFFFFu, uint32_t(valid)));
  __syncthreads();  // the tiles have been read: their place holds the numbers of keys, and the sums of the second warps
  int* numbers = reinterpret_cast<int*>(shared);
  if (me.lane == 0) numbers[me.warp] = valid;
  float* others = reinterpret_cast<float*>(shared + 64) + of_features * 32 + me.lane;
  constexpr int kStep = S::kFeatureWarps * 32;
  if (of_tokens == 1) {
#pragma unroll
    for (int i = 0; i < S::kGroups * 4; ++i) others[i * kStep] = sums.s[i / 4][i % 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      others[(S::kGroups * 4 + i) * kStep] = sums.z[i];
      others[(S::kGroups * 4 + 2 + i) * kStep] = sums.values[i];
    }
  }
  __syncthreads();
  if (of_tokens == 1) return;
  if (S::kTokenWarps == 2) {
#pragma unroll
    for (int i = 0; i < S::kGroups * 4; ++i) sums.s[i / 4][i % 4] += others[i * kStep];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums.z[i] += others[(S::kGroups * 4 + i) * kStep];
      sums.values[i] += others[(S::kGroups * 4 + 2 + i) * kStep];
    }
  }
  const int pitch = p.e + 4;
  float* out = p.parts + int64_t(blockIdx.x) * p.slot;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int feature = of_features * 16 + me.g + 8 * half, value = feature;
    if (feature < p.d) {
#pragma unroll
      for (int n = 0; n < S::kGroups; ++n)
        if (n * 8 < p.e) {
          float2 two = make_float2(sums.s[n][2 * half], sums.s[n][2 * half + 1]);
          *reinterpret_cast<float2*>(out + feature * pitch + n * 8 + 2 * me.t) = two;
        }
      if (me.t == 0) out[feature * pitch + p.e] = sums.z[half];
    }
    if (me.t == 0 && value < p.e) out[p.d * pitch + value] = sums.values[half];
  }
  if (me.thread != 0) return;
  int number = 0;
  for (int warp = 0; warp < S::kKeyThreads / 32; ++warp) number += numbers[warp];
  out[p.d * pitch + p.e] = float(number);
}

// The sum of the splits in place of the first.
static __global__ void __launch_bounds__(256) linear_add_kernel(const LinearParams p, int64_t floats, int splits) {
  const int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (at < floats) *reinterpret_cast<float4*>(p.parts + at) = add_slots(p.parts + at, floats, splits);
}

// Sums all tokens in `splits` runs; the number of slots that are left to be added by each of `readers` blocks: reading
// few of them once for each block costs less than a launch.
template <class T, class S, bool kQueries>
int sum_tokens(const LinearParams& p, const QuerySums& of, int splits, int64_t readers, void* stream) {
  const int64_t units = int64_t(p.sequences) * (p.heads / p.group), floats = units * p.slot;
  launch(kQueries ? "linear_attention_query_sums" : "linear_attention_keys", linear_sums_kernel<T, S, kQueries>,
         units * splits, S::kKeyThreads, S::kKeyBytes, stream, p, of, splits);
  if (splits <= 2 * kAddAtOnce && (splits == 1 || splits * p.slot * readers <= (3 << 20))) return splits;
  launch("linear_attention_add", linear_add_kernel, (floats / 4 + 255) / 256, 256, 0, stream, p, floats, splits);
  return 1;
}

// Calls run(format, tile) with the smallest tile that fits.
template <class Run>
void with_tile(const LinearParams& p, Element element, Run run) {
  const auto with_type = [&](auto type) {
    const int width = p.d > p.e ? p.d : p.e;
    if (width <= 32) run(type, Tile<32>{});
    else if (width <= 64) run(type, Tile<64>{});
    else run(type, Tile<128>{});
  };
  if (element == Element::bfloat16) with_type(Bf16{});
  else with_type(Half{});
}

}  // namespace vitkern
