// deformable_attention: a group of threads owns a row, a query and head or (for dvalue) a cell and head, and each of its
// threads 16 bytes of channels. No atomics: a cell adds the points that reach it in the order in which they were sorted.
#include "deformable_attention.h"

#include <math.h>

#include "tokens.cuh"

namespace vitkern {
namespace {

constexpr int kThreads = 128;

// Group g of the grid owns row g; `lane` is the thread in it. A row that does not exist is the last one, and stores nothing.
struct Row {
  int64_t at;
  int image, query, head, lane;
  bool exists;
};
__device__ __forceinline__ Row row_of(const DeformableParams& p, int per_image) {
  const int64_t count = int64_t(p.batch) * per_image * p.heads;
  const int64_t g = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / p.group;
  Row r{};
  r.exists = g < count;
  r.at = r.exists ? g : count - 1;
  r.head = int(r.at % p.heads);
  r.query = int(r.at / p.heads % per_image);
  r.image = int(r.at / p.heads / per_image);
  r.lane = int(threadIdx.x) % p.group;
  return r;
}

__device__ __forceinline__ float read(const void* data, TokenType type, int64_t at) {
  if (type == TokenType::float32) return static_cast<const float*>(data)[at];
  if (type == TokenType::bfloat16) return load_one(static_cast<const Bf16*>(data) + at);
  return load_one(static_cast<const Half*>(data) + at);
}
__device__ __forceinline__ void write(const DeformableGradient& to, int64_t at, float x) {
  if (to.type == TokenType::float32) static_cast<float*>(to.data)[at] = x;
  else if (to.type == TokenType::bfloat16) store_one(static_cast<Bf16*>(to.data) + at, x);
  else store_one(static_cast<Half*>(to.data) + at, x);
}
__device__ __forceinline__ int64_t first_of(const DeformablePlaces& v, int image, int query, int head) {
  return image * v.batch + query * v.query + head * v.head;
}
template <class T>
__device__ __forceinline__ T* row_at(const DeformableRows& v, int image, int64_t token, int head) {
  return static_cast<T*>(v.data) + image * v.batch + token * v.token + head * v.head;
}

// A point: its left upper cell, and how far it lies behind it; `alive` is false where it is nowhere.
struct Point {
  int row, column;
  float fx, fy;
  bool alive;
};
__device__ __forceinline__ Point point_of(const DeformableParams& p, const DeformableLevel& level, int64_t at) {
  const float x = read(p.locations.data, p.locations.type, at);
  const float y = read(p.locations.data, p.locations.type, at + p.locations.axis);
  const float width = float(level.width), height = float(level.height);
  Point found{};
  if (p.nearest) {
    found.alive = fabsf(x) < INFINITY && fabsf(y) < INFINITY;
    if (!found.alive) return found;
    found.column = int(fminf(fmaxf(floorf(x * width + 0.5f), 0.0f), width - 1.0f));
    found.row = int(fminf(fmaxf(floorf(y * height + 0.5f), 0.0f), height - 1.0f));
    return found;
  }
  const float u = x * width - 0.5f, v = y * height - 0.5f;
  found.alive = u > -1.0f && u < width && v > -1.0f && v < height;
  if (!found.alive) return found;
  found.column = int(floorf(u));
  found.row = int(floorf(v));
  found.fx = u - float(found.column);
  found.fy = v - float(found.row);
  return found;
}
// The share of corner c: bit 0 the right ones, bit 1 the lower ones.
__device__ __forceinline__ float share(const Point& at, int c) {
  return (c & 1 ? at.fx : 1.0f - at.fx) * (c & 2 ? at.fy : 1.0f - at.fy);
}
// The cell of corner c in the level, or -1 outside of it.
__device__ __forceinline__ int64_t cell_of(const DeformableLevel& level, const Point& at, int c) {
  const int row = at.row + (c >> 1), column = at.column + (c & 1);
  const bool inside = at.alive && row >= 0 && row < level.height && column >= 0 && column < level.width;
  return inside ? int64_t(row) * level.width + column : -1;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) forward_kernel(const DeformableParams p) {
  const Row r = row_of(p, p.queries);
  if (!r.exists) return;
  const int64_t location = first_of(p.locations, r.image, r.query, r.head), weight = first_of(p.weights, r.image, r.query, r.head);
  const int corners = p.nearest ? 1 : 4;
  for (int c = r.lane * kVector; c < p.width; c += p.group * kVector) {
    float sum[kVector] = {};
    for (int l = 0; l < p.levels; ++l) {
      const DeformableLevel& level = p.level[l];
      const T* value = row_at<T>(p.value, r.image, level.start, r.head) + c;
      for (int i = 0; i < level.points; ++i) {
        const Point at = point_of(p, level, location + level.location + i * p.locations.point);
        if (!at.alive) continue;
        const float a = read(p.weights.data, p.weights.type, weight + level.weight + i * p.weights.point);
        for (int k = 0; k < corners; ++k) {
          const int64_t cell = cell_of(level, at, k);
          if (cell < 0) continue;
          const float w = a * share(at, k);
          float x[kVector];
          load<T, kVector>(value + cell * p.value.token, x);
#pragma unroll
          for (int v = 0; v < kVector; ++v) sum[v] += w * x[v];
        }
      }
    }
    store<T, kVector>(row_at<T>(p.out, r.image, r.query, r.head) + c, sum);
  }
}

// The product of dout with a cell, over the channels of the group: every thread of a warp calls it.
template <class T, int kVector>
__device__ __forceinline__ float product(const DeformableParams& p, const Row& r, const T* dout, const T* value, bool there) {
  float sum = 0.0f;
  for (int c = r.lane * kVector; there && c < p.width; c += p.group * kVector) {
    float x[kVector], g[kVector];
    load<T, kVector>(value + c, x);
    load<T, kVector>(dout + c, g);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum += x[v] * g[v];
  }
  for (int bits = 1; bits < p.group; bits *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bits);
  return sum;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) places_kernel(const DeformableParams p) {
  const Row r = row_of(p, p.queries);
  const bool first = r.exists && r.lane == 0, products = p.dlocations.data != nullptr || p.dweights.data != nullptr;
  const int64_t location = first_of(p.locations, r.image, r.query, r.head), weight = first_of(p.weights, r.image, r.query, r.head);
  const T* dout = row_at<T>(p.dout, r.image, r.query, r.head);
  const int64_t slice = int64_t(r.image) * p.heads + r.head;
  for (int l = 0; l < p.levels; ++l) {
    const DeformableLevel& level = p.level[l];
    const T* value = row_at<T>(p.value, r.image, level.start, r.head);
    for (int i = 0; i < level.points; ++i) {
      const Point at = point_of(p, level, location + level.location + i * p.locations.point);
      const int64_t to = r.at * p.points + level.first + i;
      if (p.keys != nullptr && first)
        p.keys[to] = at.alive ? slice * p.padded + level.key + int64_t(at.row + 1) * (level.width + 1) + at.column + 1
                              : int64_t(p.batch) * p.heads * p.padded;
      if (!products) continue;
      float d[4] = {};
      for (int k = 0; k < (p.nearest ? 1 : 4); ++k) {
        const int64_t cell = cell_of(level, at, k);
        d[k] = product<T, kVector>(p, r, dout, value + (cell < 0 ? 0 : cell) * p.value.token, cell >= 0);
      }
      if (!first) continue;
      if (p.dweights.data != nullptr)
        write(p.dweights, to, share(at, 0) * d[0] + share(at, 1) * d[1] + share(at, 2) * d[2] + share(at, 3) * d[3]);
      if (p.dlocations.data == nullptr) continue;
      const bool moves = at.alive && !p.nearest;
      const float a = moves ? read(p.weights.data, p.weights.type, weight + level.weight + i * p.weights.point) : 0.0f;
      const float dx = (1.0f - at.fy) * (d[1] - d[0]) + at.fy * (d[3] - d[2]);
      const float dy = (1.0f - at.fx) * (d[2] - d[0]) + at.fx * (d[3] - d[1]);
      write(p.dlocations, 2 * to, moves ? float(level.width) * a * dx : 0.0f);
      write(p.dlocations, 2 * to + 1, moves ? float(level.height) * a * dy : 0.0f);
    }
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) cells_kernel(const DeformableParams p) {
  const Row r = row_of(p, p.cells);
  if (!r.exists) return;
  int l = 0;
  while (l + 1 < p.levels && r.query >= p.level[l + 1].start) ++l;
  const DeformableLevel& level = p.level[l];
  const int row = (r.query - int(level.start)) / level.width, column = (r.query - int(level.start)) % level.width;
  const int64_t key = (int64_t(r.image) * p.heads + r.head) * p.padded + level.key + int64_t(row + 1) * (level.width + 1) + column + 1;
  for (int c = r.lane * kVector; c < p.width; c += p.group * kVector) {
    float sum[kVector] = {};
    for (int side = p.nearest ? 1 : 0; side < 2; ++side) {  // left upper cells in the row above, and in this one
      const int64_t* near = p.begin + key - (1 - side) * (level.width + 1);
      for (int64_t e = p.nearest ? near[0] : near[-1]; e < near[1]; ++e) {
        const int64_t point = p.order[e], query = point / p.points / p.heads % p.queries;
        const int64_t i = point % p.points - level.first;
        const int64_t location = first_of(p.locations, r.image, int(query), r.head) + level.location + i * p.locations.point;
        const int64_t weight = first_of(p.weights, r.image, int(query), r.head) + level.weight + i * p.weights.point;
        const Point at = point_of(p, level, location);
        const float w = read(p.weights.data, p.weights.type, weight) * share(at, (row - at.row) * 2 + column - at.column);
        float g[kVector];
        load<T, kVector>(row_at<T>(p.dout, r.image, query, r.head) + c, g);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[v] += w * g[v];
      }
    }
    store<T, kVector>(row_at<T>(p.dvalue, r.image, r.query, r.head) + c, sum);
  }
}

enum class Work { forward, places, cells };

template <Work kWork, class T, int kVector>
void start_one(const DeformableParams& p, void* stream) {
  const int64_t rows = int64_t(p.batch) * (kWork == Work::cells ? p.cells : p.queries) * p.heads;
  const int64_t blocks = (rows * p.group + kThreads - 1) / kThreads;
  if constexpr (kWork == Work::forward) launch("deformable_attention", forward_kernel<T, kVector>, blocks, kThreads, 0, stream, p);
  else if constexpr (kWork == Work::places) launch("deformable_places", places_kernel<T, kVector>, blocks, kThreads, 0, stream, p);
  else launch("deformable_cells", cells_kernel<T, kVector>, blocks, kThreads, 0, stream, p);
}
template <Work kWork, class T>
void start_for(DeformableParams p, void* stream) {
  const int each = p.vector ? Words<T>::kCount : 1;
  p.group = 1;
  while (p.group < 32 && p.group * each < p.width) p.group *= 2;
  if (p.vector) start_one<kWork, T, Words<T>::kCount>(p, stream);
  else start_one<kWork, T, 1>(p, stream);
}
template <Work kWork>
void start(const DeformableParams& p, void* stream) {
  if (p.type == TokenType::float32) return start_for<kWork, float>(p, stream);
  if (p.type == TokenType::bfloat16) return start_for<kWork, Bf16>(p, stream);
  return start_for<kWork, Half>(p, stream);
}

}  // namespace

void deformable_forward(const DeformableParams& p, void* stream) { start<Work::forward>(p, stream); }
void deformable_places(const DeformableParams& p, void* stream) { start<Work::places>(p, stream); }
void deformable_cells(const DeformableParams& p, void* stream) { start<Work::cells>(p, stream); }

}  // namespace vitkern
