// linear_attention, forward, on tensor cores: sums over runs of keys, the runs added in order, then the queries.
//
// Products are tf32 with float32 sums: q, k and v of 16 bits are tf32 numbers themselves, features that are not and the
// sums S enter as pairs of them. No block waits for another and nothing is added atomically: where the sums of the runs
// are few and small each block of queries adds them for itself, else a launch in between does, in the same order.
#include "linear_attention.cuh"

namespace vitkern {
namespace {

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
  static constexpr int kKeyStageBytes = 2 * kMatrixBytes + 4 * kLinearTile;  // K | V | a factor for each key
  static constexpr int kKeyBytes = kKeyStages * kKeyStageBytes;
  // queries: a warp owns 16 tokens
  static constexpr int kQueryThreads = 2 * kLinearTile, kPitch = kWidth + 4;  // floats of a row of S
  static constexpr int kSums = (kWidth * kPitch + 2 * kWidth + 4) * 4;        // S | z | the values | their number
  static constexpr int kQueryBytes = kSums + 2 * kMatrixBytes;
  static constexpr int kBlocks = kWidth == 32 ? 6 : kWidth == 64 ? 4 : 2;  // on a multiprocessor
};

// Starts to load a tile of keys and values: several threads to a row. Adds the valid keys to `valid`.
template <class S>
__device__ __forceinline__ void load_keys(const LinearParams& p, int64_t k_at, int64_t v_at, int64_t mask_at,
                                          int64_t weight_at, const Run& run, int tile, unsigned char* stage,
                                          int& valid) {
  constexpr int kSharing = S::kKeyThreads / kLinearTile;
  const int row = threadIdx.x / kSharing, part = threadIdx.x % kSharing, t = run.start + tile * kLinearTile + row;
  const int token = run.first + t;
  bool seen = t < run.stop;
  if (seen && p.mask.data != nullptr)
    seen = static_cast<const uint8_t*>(p.mask.data)[mask_at + token_offset(p.keys, p.mask, token)] != 0;
  const uint16_t* k = static_cast<const uint16_t*>(p.k.data) + k_at + token_offset(p.keys, p.k, token);
  const uint16_t* v = static_cast<const uint16_t*>(p.v.data) + v_at + token_offset(p.keys, p.v, token);
  for (int chunk = part; chunk * 8 < p.d; chunk += kSharing)
    load_chunk(stage + row * S::kRowBytes + chunk * 16, seen ? k + chunk * 8 : nullptr, p.k.vector);
  stage += S::kMatrixBytes;
  for (int chunk = part; chunk * 8 < p.e; chunk += kSharing)
    load_chunk(stage + row * S::kRowBytes + chunk * 16, seen ? v + chunk * 8 : nullptr, p.v.vector);
  if (part != 0) return;
  float factor = seen ? 1.0f : 0.0f;
  if (seen && p.weight.data != nullptr)
    factor = static_cast<const float*>(p.weight.data)[weight_at + token_offset(p.keys, p.weight, token)];
  reinterpret_cast<float*>(stage + S::kMatrixBytes)[row] = factor;
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

// Adds 16 keys.
template <class T, class S>
__device__ __forceinline__ void add_keys(const LinearParams& p, const unsigned char* stage, int step, int of_features,
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
    b[i] *= factors[i / 4 * 8 + i / 2 % 2];
    sums.z[i % 2] += b[i];
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
      if (pair == of_features) sums.values[i / 2] += two.x + two.y;
      mma_16x8x8_tf32(c, {high[at], high[at + 1], high[at + 2], high[at + 3]}, first, second);
      if (!exact) mma_16x8x8_tf32(c, {low[at], low[at + 1], low[at + 2], low[at + 3]}, first, second);
    }
  }
}

// The sums of a run of keys. Grid: sequences x key heads (fastest), splits.
template <class T, class S>
__global__ void __launch_bounds__(S::kKeyThreads, S::kBlocks) linear_keys_kernel(const LinearParams p) {
  unsigned char* shared = dynamic_shared();
  const Lane me = this_lane();
  const int of_features = me.warp % S::kFeatureWarps, of_tokens = me.warp / S::kFeatureWarps;
  const int heads = p.heads / p.group, units = p.sequences * heads;
  const int unit = blockIdx.x % units, sequence = unit / heads, head = unit % heads;
  const Run run = run_of(p.keys, sequence, blockIdx.x / units, p.splits);
  const int64_t k_at = head_offset(p, p.k, sequence, head), v_at = head_offset(p, p.v, sequence, head);
  const int64_t mask_at = head_offset(p, p.mask, sequence, 0), weight_at = head_offset(p, p.weight, sequence, head);
  const int tiles = (run.stop - run.start + kLinearTile - 1) / kLinearTile;
  const bool exact = exact_features(p) && p.weight.data == nullptr;
  Sums<S> sums{};
  int valid = 0;

  const auto load = [&](int tile) {
    if (tile < tiles)
      load_keys<S>(p, k_at, v_at, mask_at, weight_at, run, tile,
                   shared + tile % S::kKeyStages * S::kKeyStageBytes, valid);
    copy_commit();
  };
  for (int tile = 0; tile < S::kKeyStages - 1; ++tile) load(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    unsigned char* stage = shared + tile % S::kKeyStages * S::kKeyStageBytes;
    copy_wait<S::kKeyStages - 2>();
    __syncthreads();  // this tile is complete; the one before has been read by all
    load(tile + S::kKeyStages - 1);
    if (p.map == FeatureMap::silu_norm) {
      divide_by_norms<T, S>(p, stage);
      __syncthreads();  // the factors are complete
    }
    if (of_features * 16 < p.d || of_features * 16 < p.e)
      for (int step = of_tokens; step < kLinearTile / 16; step += S::kTokenWarps)
        add_keys<T, S>(p, stage, step, of_features, exact, me, sums);
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

// The sum of the splits in place of the first.
__global__ void __launch_bounds__(256) linear_add_kernel(const LinearParams p, int64_t floats) {
  const int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (at < floats) *reinterpret_cast<float4*>(p.parts + at) = add_slots(p.parts + at, floats, p.splits);
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

// o = num of_num + V of_values; 0 where the divisor is 0.
struct Factors {
  float of_num, of_values;
};
__device__ __forceinline__ Factors factors_of(const LinearParams& p, float dot, float n) {
  const float den = dot * p.scale + p.offset * n;
  if (p.divisor == Divisor::none) return {p.scale, p.offset};
  if (p.divisor == Divisor::subtract) {
    const float count = fmaxf(n, 1.0f);
    return {p.scale / count, p.offset / count + (1.0f - den / count) / count};
  }
  float divisor = den + p.eps;
  if (p.divisor == Divisor::mean) divisor = den + n * p.eps;
  if (p.divisor == Divisor::max) divisor = den > p.eps ? den : p.eps;
  if (p.divisor == Divisor::abs_max) divisor = fabsf(den) > p.eps ? fabsf(den) : p.eps;
  if (divisor == 0.0f) return {0.0f, 0.0f};
  return {p.scale / divisor, p.offset / divisor};
}

// The products of the 16 queries of a warp with S, and with z, of which two rows lie in a lane; `dot` is divided by the
// norm of the features, and so is what the products are to be multiplied with: the result.
template <class T, class S>
__device__ __forceinline__ void multiply_queries(const LinearParams& p, const unsigned char* q, const float* s,
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
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      dot[h] += __shfl_xor_sync(0xFFFFFFFFu, dot[h], bits);
      squares[h] += __shfl_xor_sync(0xFFFFFFFFu, squares[h], bits);
    }
    inverse[h] = p.map == FeatureMap::silu_norm ? 1.0f / sqrtf(squares[h]) : 1.0f;
    dot[h] *= inverse[h];
  }
}

// The outputs of a run of queries. Grid: sequences x heads (fastest), query_splits.
template <class T, class S>
__global__ void __launch_bounds__(S::kQueryThreads, S::kBlocks)
    linear_queries_kernel(const LinearParams p, int splits) {
  unsigned char* shared = dynamic_shared();
  float* s = reinterpret_cast<float*>(shared);
  const float* values = s + S::kWidth * (S::kPitch + 1);
  const Lane me = this_lane();
  const int units = p.sequences * p.heads, unit = blockIdx.x % units, part = blockIdx.x / units;
  const int sequence = unit / p.heads, head = unit % p.heads;
  const Run run = run_of(p.queries, sequence, part, p.query_splits);
  const int64_t q_at = head_offset(p, p.q, sequence, head), out_at = head_offset(p, p.out, sequence, head);
  unsigned char* own = shared + S::kSums + me.warp * 16 * S::kRowBytes;  // 16 rows in each of two stages

  const auto at_chunk = [&](int tile, int i, int& row, int& chunk, int& token) {
    row = i / S::kGroups;
    chunk = i % S::kGroups;
    token = run.start + tile * kLinearTile + me.warp * 16 + row;
    const bool real = token < run.stop;
    token += run.first;
    return real;
  };
  const auto load = [&](int tile) {
    for (int i = me.lane; i < 16 * S::kGroups && run.start + tile * kLinearTile < run.stop; i += 32) {
      int row, chunk, token;
      const bool real = at_chunk(tile, i, row, chunk, token);
      if (chunk * 8 >= p.d) continue;
      const uint16_t* q = static_cast<const uint16_t*>(p.q.data) + q_at + token_offset(p.queries, p.q, token);
      load_chunk(own + tile % 2 * S::kMatrixBytes + row * S::kRowBytes + chunk * 16, real ? q + chunk * 8 : nullptr,
                 p.q.vector);
    }
    copy_commit();
  };
  load(0);
  load_sums<S>(p, sequence * (p.heads / p.group) + head / p.group, splits, part == 0 && head % p.group == 0, s);
  __syncthreads();
  const float n = values[S::kWidth];
  for (int tile = 0; run.start + tile * kLinearTile < run.stop; ++tile) {
    unsigned char* q = own + tile % 2 * S::kMatrixBytes;
    load(tile + 1);
    copy_wait<1>();
    __syncwarp();
    float num[S::kGroups][4] = {}, dot[2] = {}, inverse[2];
    multiply_queries<T, S>(p, q, s, me, num, dot, inverse);
    const Factors low = factors_of(p, dot[0], n), high = factors_of(p, dot[1], n);
    const float of_num[2] = {low.of_num * inverse[0], high.of_num * inverse[1]};
    const float of_values[2] = {low.of_values, high.of_values};
    __syncwarp();  // the rows of Q have been read
#pragma unroll
    for (int c = 0; c < S::kGroups; ++c) {
      if (c * 8 >= p.e) break;
      const float2 v = *reinterpret_cast<const float2*>(values + c * 8 + 2 * me.t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = num[c][2 * h] * of_num[h] + v.x * of_values[h], y = num[c][2 * h + 1] * of_num[h] + v.y * of_values[h];
        *reinterpret_cast<uint32_t*>(q + (me.g + 8 * h) * S::kRowBytes + c * 16 + me.t * 4) = pack2<T>(x, y);
      }
    }
    __syncwarp();  // the results are complete; a lane stores the chunks into which it will load
    for (int i = me.lane; i < 16 * S::kGroups; i += 32) {
      int row, chunk, token;
      if (!at_chunk(tile, i, row, chunk, token) || chunk * 8 >= p.e) continue;
      uint16_t* out = static_cast<uint16_t*>(p.out.data) + out_at + token_offset(p.queries, p.out, token);
      store_chunk(out + chunk * 8, q + row * S::kRowBytes + chunk * 16, p.out.vector);
    }
  }
  copy_wait_all();
}

}  // namespace

void linear_attention_forward(const LinearParams& p, Element element, void* stream) {
  const int64_t units = int64_t(p.sequences) * (p.heads / p.group), blocks = int64_t(p.sequences) * p.heads * p.query_splits;
  const int64_t floats = units * p.slot;
  if (units == 0) return;
  // Reading all sums once for each block of queries costs less than a launch.
  const bool few = p.splits == 1 || (p.splits <= 2 * kAddAtOnce && p.splits * p.slot * blocks <= (3 << 20));
  const auto run = [&](auto type, auto shape) {
    using T = decltype(type);
    using S = decltype(shape);
    launch("linear_attention_keys", linear_keys_kernel<T, S>, units * p.splits, S::kKeyThreads, S::kKeyBytes, stream, p);
    if (!few) launch("linear_attention_add", linear_add_kernel, (floats / 4 + 255) / 256, 256, 0, stream, p, floats);
    launch("linear_attention_queries", linear_queries_kernel<T, S>, blocks, S::kQueryThreads, S::kQueryBytes, stream, p,
           few ? p.splits : 1);
  };
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
