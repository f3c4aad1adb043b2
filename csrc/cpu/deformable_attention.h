// What the glue hands to the kernels of deformable attention: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace vitkern {

// value [B, S, H, D], out [B, N, H, D] and their gradients: strides in elements. data is null where the tensor is absent.
struct DeformRows {
  char* data;
  Dtype dtype;
  int64_t batch, token, head, dim;
};
// locations [B, N, H, J, 2] and weights [B, N, H, J]; where the points of a level begin stands in DeformLevel.
struct DeformPlaces {
  char* data;
  Dtype dtype;
  int64_t batch, query, head, point, axis;
};
struct DeformLevel {
  int32_t height, width, first, points;  // first: the points of the levels before
  int64_t start;                         // cells of the levels before
  int64_t locations, weights;            // elements from a query's and head's first point to that of the level
};

constexpr int32_t kDeformRows = 16;  // of a block; a row is a query and head, the heads of a query behind each other

// One call. Acc is float or double, as the kernels.
struct DeformProblem {
  DeformRows value, out, dout, dvalue;
  DeformPlaces locations, weights, dlocations, dweights;  // the gradients are contiguous
  void* dsoft;                                            // Acc [B][N][H][J]: dweights before the softmax's own gradient, or null
  const DeformLevel* level;
  int64_t batch, queries;
  int32_t heads, dim, levels, points;  // points: of all levels
  bool nearest, normalize;
  int64_t chunk;  // queries of a task that takes one head's cells along, or 0: tasks are blocks of all heads
};

// How often a cell is read, on average, before its row is worth a copy to where a head's cells lie side by side.
constexpr int64_t kDeformReads = 4;

// `scratch` is aligned to 64 bytes and holds forward_bytes(p) or backward_bytes(p).
struct DeformKernels {
  int64_t (*forward_bytes)(const DeformProblem& p);
  int64_t (*backward_bytes)(const DeformProblem& p);
  // out of the block of rows that starts at `first`, of all heads
  void (*forward)(const DeformProblem& p, int64_t image, int64_t first, void* scratch);
  // out of one head and the chunk of queries that starts at `first`
  void (*forward_head)(const DeformProblem& p, int64_t image, int32_t head, int64_t first, void* scratch);
  // all gradients that one level of one head takes part in: a slice of dvalue, dlocations and dweights
  void (*backward)(const DeformProblem& p, int64_t image, int32_t head, int32_t level, void* scratch);
  // dweights from dsoft
  void (*softmax)(const DeformProblem& p, int64_t image, int64_t first, void* scratch);
};

}  // namespace vitkern
