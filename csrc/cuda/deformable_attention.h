// The host side of the CUDA kernels of deformable attention: parameters and entry points. No torch, no CUDA.
#pragma once
#include <stdint.h>

#include "tokens.h"

namespace vitkern {

constexpr int kDeformableLevels = 8;

// value [B, S, H, D], out [B, N, H, D] and their gradients: the last dimension is contiguous; strides in elements.
struct DeformableRows {
  void* data;
  int64_t batch, token, head;
};
// locations [B, N, H, J, 2] and weights [B, N, H, J]; where the points of a level begin stands in DeformableLevel.
struct DeformablePlaces {
  const void* data;
  TokenType type;
  int64_t batch, query, head, point, axis;
};
// Their gradients, contiguous; null where not wanted.
struct DeformableGradient {
  void* data;
  TokenType type;
};
// `start`, `key` and `first`: the cells, keys and points of the levels before. A level has a key for every cell and, in front,
// a row and a column of further ones: for points whose left upper cell is outside.
struct DeformableLevel {
  int32_t height, width, points, first;
  int64_t start, key, location, weight;
};

struct DeformableParams {
  DeformableRows value, out, dout, dvalue;
  TokenType type;
  DeformablePlaces locations, weights;
  DeformableGradient dlocations, dweights;
  int64_t* keys;                   // [B][N][H][J]: the left upper cell of every point; B H padded for one that is nowhere
  const int64_t *order, *begin;    // the points by their keys; where each key begins, [B H padded + 1]
  DeformableLevel level[kDeformableLevels];
  int32_t levels, batch, queries, heads, width, points, cells;
  int64_t padded;                  // keys of an image and head
  int32_t nearest;
  int32_t vector;                  // rows start on 16-byte boundaries and hold whole 16-byte words
  int32_t group;                   // threads of a row: a power of two up to 32
};

void deformable_forward(const DeformableParams& p, void* stream);
void deformable_places(const DeformableParams& p, void* stream);  // keys, dlocations and dweights
void deformable_cells(const DeformableParams& p, void* stream);   // dvalue

}  // namespace vitkern
