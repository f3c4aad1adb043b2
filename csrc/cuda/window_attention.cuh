// What the forward and the backward of window attention share: the walk over rows, products, scores and masks.
//
// A block owns one head and a run of windows. A window of N <= 64 tokens is padded to a tile in shared memory; warp w
// owns its rows 16 w .. 16 w + 15: it loads them, computes their scores in registers, and stores their results.
// Rows and columns of the tile beyond N, D and Dv are zeroed once and never written again.
#pragma once
#include "../common/philox.h"
#include "tiles.cuh"
#include "window_attention.h"

namespace vitkern {

// The tile: kWidth columns (D and Dv at most), kTiles groups of 8 keys.
template <int kWidth_, int kTiles_>
struct TileShape {
  static constexpr int kWidth = kWidth_, kTiles = kTiles_;
  static constexpr int kSteps = (kTiles + 1) / 2;        // groups of 16 keys
  static constexpr int kRows = 16 * kSteps;
  static constexpr int kThreads = 32 * kSteps;           // at most; a warp per 16 tokens
  static constexpr int kRowBytes = 2 * kWidth + 16;      // 16 bytes of padding keep load_matrix free of bank conflicts
  static constexpr int kMatrixBytes = kRows * kRowBytes;
  static constexpr int kChunks = kWidth / 8;             // 16-byte chunks of a row
  static constexpr int kStages = kWidth > 64 ? 1 : 2;    // windows in shared memory
  static constexpr int kBiasBytes = kTiles * kThreads * 16;
};

// Per slot of a window: its region, and whether a pad stands there. Filled only for special windows.
constexpr int kPadBit = 128;

__device__ __forceinline__ int64_t offset_of(const TokenView& x, int32_t image, const int32_t* at, int rank) {
  int64_t offset = int64_t(image) * x.batch;
#pragma unroll
  for (int i = kMaxAxes - 1; i >= 0; --i)
    if (i >= 2 || rank > 2) offset += int64_t(at[i]) * x.axis[i];
  return offset;
}

// Calls visit(row, chunk, real, at) for every 16-byte chunk of the rows of this warp, a row's chunks on adjacent lanes.
template <class S, class Visit>
__device__ __forceinline__ void for_own_chunks(const WindowParams& p, const WindowCursor& cursor,
                                               const uint32_t* place, const Lane& me, Visit visit) {
  constexpr int kRowsAtOnce = 32 / S::kChunks;
#pragma unroll
  for (int pass = 0; pass < 16 / kRowsAtOnce; ++pass) {
    const int row = me.warp * 16 + pass * kRowsAtOnce + me.lane / S::kChunks;
    if (row >= p.map.size) continue;
    int32_t at[kMaxAxes];
    const bool real = token_at(p.map, cursor, place[row], at);
    visit(row, me.lane % S::kChunks, real, at);
  }
}

// Starts to load one chunk of a map; a pad reads `pad`, a row of this head, or zeros.
template <class S>
__device__ __forceinline__ void load_row_chunk(const WindowParams& p, const TokenView& x, int head, int width,
                                               const WindowCursor& cursor, const void* pad, unsigned char* matrix,
                                               int row, int chunk, bool real, const int32_t* at) {
  if (chunk * 8 >= width) return;
  const uint16_t* source = nullptr;
  if (real)
    source = static_cast<const uint16_t*>(x.data) + offset_of(x, cursor.image, at, p.map.rank) + head * x.head;
  else if (pad != nullptr)
    source = static_cast<const uint16_t*>(pad) + int64_t(head) * width;
  load_chunk(matrix + row * S::kRowBytes + chunk * 16, source == nullptr ? nullptr : source + chunk * 8,
             real && x.vector);
}

// Writes the own rows of `matrix` to a map; rows of pads are dropped.
template <class S>
__device__ __forceinline__ void store_rows(const WindowParams& p, const TokenView& x, int head, int width,
                                           const WindowCursor& cursor, const unsigned char* matrix,
                                           const uint32_t* place, const Lane& me) {
  for_own_chunks<S>(p, cursor, place, me, [&](int row, int chunk, bool real, const int32_t* at) {
    if (!real || chunk * 8 >= width) return;
    uint16_t* target = static_cast<uint16_t*>(x.data) + offset_of(x, cursor.image, at, p.map.rank) + head * x.head +
                       chunk * 8;
    store_chunk(target, matrix + row * S::kRowBytes + chunk * 16, x.vector);
  });
}

// Puts a 16 x kWidth result, as mma leaves it, into the own rows of `matrix`, rounded to T.
template <class T, class S>
__device__ __forceinline__ void stage_rows(const float (&c)[S::kWidth / 8][4], unsigned char* matrix, const Lane& me) {
  unsigned char* row = matrix + (me.warp * 16 + me.g) * S::kRowBytes + me.t * 4;
#pragma unroll
  for (int n = 0; n < S::kWidth / 8; ++n) {
    *reinterpret_cast<uint32_t*>(row + n * 16) = pack2<T>(c[n][0], c[n][1]);
    *reinterpret_cast<uint32_t*>(row + n * 16 + 8 * S::kRowBytes) = pack2<T>(c[n][2], c[n][3]);
  }
}

template <class T>
constexpr uint32_t kOne = 0;  // 1.0 in the format T
template <>
constexpr uint32_t kOne<Bf16> = 0x3F80;
template <>
constexpr uint32_t kOne<Half> = 0x3C00;
template <class T>
constexpr uint32_t kExponent = 0;  // the exponent bits, all set in NaN and infinity
template <>
constexpr uint32_t kExponent<Bf16> = 0x7F80;
template <>
constexpr uint32_t kExponent<Half> = 0x7C00;

// A pair of elements with NaN and infinity replaced by 0 (`keep_finite`), or 1.0 where they stand and 0 elsewhere.
template <class T>
__device__ __forceinline__ uint32_t split_finite(uint32_t both, bool keep_finite) {
  const uint32_t low = both & 0xFFFFu, high = both >> 16;
  const bool low_bad = (low & kExponent<T>) == kExponent<T>, high_bad = (high & kExponent<T>) == kExponent<T>;
  if (keep_finite) return (low_bad ? 0u : low) | (high_bad ? 0u : high) << 16;
  return (low_bad ? kOne<T> : 0u) | (high_bad ? kOne<T> : 0u) << 16;
}

// acc = A B^T: the own 16 rows of A against the first 8 kTiles rows of B, over the first `width` columns. kFinite: with
// zeros where B is not finite.
template <class T, class S, bool kFinite = false>
__device__ __forceinline__ void product_with_rows(float (&acc)[S::kTiles][4], const unsigned char* a,
                                                  const unsigned char* b, int width, const Lane& me) {
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  const unsigned char* a_row = a + (me.warp * 16 + (me.lane & 15)) * S::kRowBytes + (me.lane >> 4) * 16;
  const unsigned char* b_row = b + ((me.lane & 7) + (me.lane >> 4) * 8) * S::kRowBytes + ((me.lane >> 3) & 1) * 16;
#pragma unroll
  for (int step = 0; step < S::kWidth / 16; ++step) {
    if (step * 16 >= width) break;
    uint32_t af[4];
    load_matrix_x4(af, a_row + step * 32);
#pragma unroll
    for (int pair = 0; pair < S::kSteps; ++pair) {
      uint32_t bf[4];
      load_matrix_x4(bf, b_row + pair * 16 * S::kRowBytes + step * 32);
      if (kFinite)
#pragma unroll
        for (int i = 0; i < 4; ++i) bf[i] = split_finite<T>(bf[i], true);
      mma_16x8x16<T>(acc[2 * pair], af, bf[0], bf[1]);
      if (2 * pair + 1 < S::kTiles) mma_16x8x16<T>(acc[2 * pair + 1], af, bf[2], bf[3]);
    }
  }
}

// Address that this lane passes to load_matrix_x4_transposed for 16 rows of B and 16 of its columns.
template <class S>
__device__ __forceinline__ const unsigned char* transposed_row(const unsigned char* b, const Lane& me) {
  return b + (me.lane & 15) * S::kRowBytes + (me.lane >> 4) * 16;
}

// The row of the bias table for (i, j), the index clamped into the table.
__device__ __forceinline__ int64_t table_row(const WindowParams& p, int i, int j) {
  const int64_t row = p.index[i * p.index_stride[0] + j * p.index_stride[1]];
  return row < 0 ? 0 : row < p.table_rows ? row : p.table_rows - 1;
}

// Element (i, j) of the bias as float.
__device__ __forceinline__ float read_bias(const WindowParams& p, int head, int i, int j) {
  if (p.bias_type == BiasType::none) return 0.0f;
  int64_t at = head * p.bias_stride[0] + i * p.bias_stride[1] + j * p.bias_stride[2];
  if (p.index != nullptr) at = head * p.bias_stride[1] + table_row(p, i, j) * p.bias_stride[0];
  if (p.bias_type == BiasType::float32) return static_cast<const float*>(p.bias)[at];
  const uint32_t bits = static_cast<const uint16_t*>(p.bias)[at];
  return p.bias_type == BiasType::bfloat16 ? unpack2<Bf16>(bits).x : unpack2<Half>(bits).x;
}

// Element c of the fragment of key group n: its row in the tile, its column.
__device__ __forceinline__ int fragment_row(const Lane& me, int c) { return me.warp * 16 + me.g + (c >> 1) * 8; }
__device__ __forceinline__ int fragment_column(const Lane& me, int n, int c) { return n * 8 + me.t * 2 + (c & 1); }

// Writes the bias times log2 e in fragment order to this thread's own places, -inf in columns beyond N, and returns
// one bit per element: the bias itself is -inf.
template <class S>
__device__ __forceinline__ uint32_t load_bias(const WindowParams& p, int head, float4* fragments, const Lane& me) {
  uint32_t hidden = 0;
#pragma unroll 1
  for (int n = 0; n < S::kTiles; ++n) {
    float value[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = fragment_row(me, c), j = fragment_column(me, n, c);
      value[c] = i < p.map.size && j < p.map.size ? read_bias(p, head, i, j) * kLog2E : 0.0f;
      if (value[c] == -INFINITY) hidden |= 1u << (n * 4 + c);
      if (j >= p.map.size) value[c] = -INFINITY;
    }
    fragments[n * blockDim.x + me.thread] = make_float4(value[0], value[1], value[2], value[3]);
  }
  return hidden;
}

// For a special window, one bit per element: the key is a pad that is not seen (`pads`), or row and key lie in
// different regions (`apart`).
template <class S>
__device__ __forceinline__ void window_masks(const WindowParams& p, const uint8_t* info, const Lane& me,
                                             uint32_t* pads, uint32_t* apart) {
  const int row[2] = {info[fragment_row(me, 0)] & (kPadBit - 1), info[fragment_row(me, 2)] & (kPadBit - 1)};
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int key = info[fragment_column(me, n, c)];
      if ((key & kPadBit) && !p.pad_visible) *pads |= 1u << (n * 4 + c);
      if ((key & (kPadBit - 1)) != row[c >> 1]) *apart |= 1u << (n * 4 + c);
    }
}

// Scores in units of log2: acc = acc * factor + bias, plus the region mask; -inf where hidden. `hidden` and `apart`
// are bits per element, 0 in almost every window.
template <class S>
__device__ __forceinline__ void finish_scores(float (&acc)[S::kTiles][4], float factor, const float4* fragments,
                                              uint32_t hidden, uint32_t apart, float mask, const Lane& me) {
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n) {
    const float4 b = fragments[n * blockDim.x + me.thread];
    acc[n][0] = fmaf(acc[n][0], factor, b.x);
    acc[n][1] = fmaf(acc[n][1], factor, b.y);
    acc[n][2] = fmaf(acc[n][2], factor, b.z);
    acc[n][3] = fmaf(acc[n][3], factor, b.w);
  }
  if ((hidden | apart) == 0) return;
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (apart >> (n * 4 + c) & 1) acc[n][c] += mask;
      if (hidden >> (n * 4 + c) & 1) acc[n][c] = -INFINITY;
    }
}

// One bit per element: dropout keeps it. `tokens` are the query tokens on the map of the rows g and g + 8.
template <class S>
__device__ __forceinline__ uint32_t dropout_bits(const WindowParams& p, int32_t image, int head,
                                                 const uint32_t (&tokens)[2], const Lane& me) {
  const uint64_t seed = uint64_t(*p.seed);
  const uint64_t first = p.first_head ? uint64_t(*p.first_head) : 0;
  const uint32_t counted = uint32_t(head) + uint32_t(first), sample = uint32_t(image) + uint32_t(first >> 32);
  uint32_t keep = 0;
#pragma unroll 1
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PhiloxWords r = philox(seed, sample, counted, tokens[half],
                                   uint32_t(n * 2 + (me.t >> 1)));
      const uint32_t first = me.t & 1 ? r.lane[2] : r.lane[0], second = me.t & 1 ? r.lane[3] : r.lane[1];
      if (first >= p.dropout_threshold) keep |= 1u << (n * 4 + half * 2);
      if (second >= p.dropout_threshold) keep |= 1u << (n * 4 + half * 2 + 1);
    }
  return keep;
}

// The row-major number on the map of the token in `row` (0 for a pad).
__device__ __forceinline__ uint32_t token_number(const WindowParams& p, const WindowCursor& cursor, uint32_t packed) {
  int32_t at[kMaxAxes];
  const bool real = token_at(p.map, cursor, packed, at);
  uint32_t number = 0;
#pragma unroll
  for (int i = 0; i < kMaxAxes; ++i) number = number * uint32_t(p.map.axis[i].length) + uint32_t(at[i]);
  return real ? number : 0;
}

// Divides the own rows of a matrix by max(norm, eps), in place, and keeps 1 / norm per row, or -1 / eps where the norm
// is at most eps (null: keeps nothing). Two lanes share a row.
template <class T, class S>
__device__ __forceinline__ void normalize_own_rows(const WindowParams& p, unsigned char* matrix, float* inverse_norm,
                                                   const Lane& me) {
  const int row = me.warp * 16 + (me.lane >> 1);
  uint32_t* words = reinterpret_cast<uint32_t*>(matrix + row * S::kRowBytes);
  float square = 0.0f;
#pragma unroll 4
  for (int i = me.lane & 1; i < S::kWidth / 2; i += 2) {
    const float2 x = unpack2<T>(words[i]);
    square += x.x * x.x + x.y * x.y;
  }
  square += __shfl_xor_sync(0xFFFFFFFFu, square, 1);
  if (row >= p.map.size) return;
  const bool small = square <= p.cosine_eps * p.cosine_eps;
  const float inverse = 1.0f / (small ? p.cosine_eps : sqrtf(square));
#pragma unroll 4
  for (int i = me.lane & 1; i < S::kWidth / 2; i += 2) {
    const float2 x = unpack2<T>(words[i]);
    words[i] = pack2<T>(x.x * inverse, x.y * inverse);
  }
  if (inverse_norm != nullptr && (me.lane & 1) == 0) inverse_norm[row] = small ? -inverse : inverse;
}

enum class Values { all, finite, not_finite };

// acc = A V over 16 channels: the own rows of weights, of which fragment(step, a) gives 16 columns, against all keys.
template <class T, class S, Values kValues, class Fragment>
__device__ __forceinline__ void weigh_values(float (&acc)[2][4], const unsigned char* v, Fragment fragment) {
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t a[4], b[4];
    fragment(step, a);
    load_matrix_x4_transposed(b, v + step * 16 * S::kRowBytes);
    if (kValues != Values::all)
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = split_finite<T>(b[i], kValues == Values::finite);
    mma_16x8x16<T>(acc[0], a, b[0], b[1]);
    mma_16x8x16<T>(acc[1], a, b[2], b[3]);
  }
}

// Ones where the own rows see one of the 16 keys of a step, zeros elsewhere, as a fragment of A.
template <class T>
__device__ __forceinline__ void seen_keys(uint32_t hidden, int step, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = ~hidden >> (step * 8 + i * 2);
    a[i] = (two & 1 ? kOne<T> : 0u) | (two & 2 ? kOne<T> << 16 : 0u);
  }
}

// Zeroes `bytes` (a multiple of 16) of shared memory with all threads, and fills the table of packed positions.
__device__ __forceinline__ void clear_shared(void* shared, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    *reinterpret_cast<uint4*>(static_cast<unsigned char*>(shared) + i) = make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ void fill_places(const WindowParams& p, uint32_t* place) {
  for (int i = threadIdx.x; i < kMaxTokens; i += blockDim.x)
    place[i] = i < p.map.size ? pack_position(p.map, i) : 0;
}

// Region and pad bit of the own 16 slots of a special window.
__device__ __forceinline__ void fill_info(const WindowParams& p, const WindowCursor& cursor, const uint32_t* place,
                                          uint8_t* info, const Lane& me) {
  const int slot = me.warp * 16 + me.lane;
  if (me.lane >= 16 || slot >= p.map.size) return;
  int32_t at[kMaxAxes];
  const bool real = token_at(p.map, cursor, place[slot], at);
  info[slot] = uint8_t(region_at(p.map, cursor, place[slot]) | (real ? 0 : kPadBit));
}

// What multiplies q.k to give scores in units of log2.
__device__ __forceinline__ float score_factor(const WindowParams& p, int head) {
  if (p.logit_scale == nullptr) return p.scale * kLog2E;
  const float tau = p.logit_scale[head];
  return expf(tau > p.cosine_max ? p.cosine_max : tau) * kLog2E;
}

// Calls run.template operator()<T, S>() with the smallest tile that fits.
template <class T, class Run>
void with_tile(const WindowParams& p, Run run) {
  const int width = p.d > p.dv ? p.d : p.dv;
  if (width <= 32) {
    if (p.map.size <= 32) run(T{}, TileShape<32, 4>{});
    else if (p.map.size <= 56) run(T{}, TileShape<32, 7>{});
    else run(T{}, TileShape<32, 8>{});
  } else if (width <= 64) {
    run(T{}, TileShape<64, 8>{});
  } else {
    run(T{}, TileShape<128, 8>{});
  }
}

}  // namespace vitkern
