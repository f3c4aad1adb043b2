// What the glue hands to the matching kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"
#include "../common/tokens.h"

namespace vitkern {

// One call. Acc below is float, or double for double metrics.
struct MatchProblem {
  const char* metric;  // [B, N, H, C], strides in elements
  Dtype dtype;
  int64_t batch_stride, token_stride, head_stride, dim_stride;
  int64_t batch;
  int32_t tokens, heads, width;
  bool cosine;
  double eps;
  const int32_t* segments;  // [B][N], or null
  int64_t segment_batch, segment_token;
  MatchWindow window;
  const int32_t *sources, *destinations;              // [B][N]: positions, ascending
  const int32_t *source_count, *destination_count;    // [B]
  void* packed;                   // Acc [B][panels][C][panel]: destinations, divided by their norm
  int64_t panels;                 // of a sample, the most that any has
  float* score;                   // [B][N]
  int32_t* dst;                   // [B][N]
};

// `pack` writes one panel of destinations; `match` finds the partners of sources [first, last) of a sample, whose panels
// are all packed. `scratch` is aligned to 64 bytes and holds scratch_bytes(p, last - first).
struct MatchKernels {
  int32_t panel, rows;  // destinations of a panel, sources of a tile
  int64_t (*scratch_bytes)(const MatchProblem& p, int64_t rows);
  void (*pack)(const MatchProblem& p, int64_t sample, int64_t panel, void* scratch);
  void (*match)(const MatchProblem& p, int64_t sample, int32_t first, int32_t last, void* scratch);
};

}  // namespace vitkern
