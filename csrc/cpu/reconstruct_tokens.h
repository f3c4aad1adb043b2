// What the glue hands to the reconstruction kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "distances.h"

namespace vitkern {

// One call. The columns of `distances` are the centres, one group per sample.
struct ReconstructProblem {
  DistanceProblem distances;
  RowsView y, out, dout, dx;  // [B, M, C], [B, N, C], [B, N, C], [B, N, E]
  int32_t clusters, width;    // M, C
  int32_t keep;               // entries of a row that stay, at most M
  double temperature;
  bool l2;
  bool needs_y, needs_x, needs_centers;
};

// `forward` writes out of rows [first, last); `backward` their dx, and adds to a chunk's own sums (Acc): dy [M][C], and for
// the centres sum dd x [M][E] and sum dd [M]. `scratch` is aligned to 64 bytes and holds scratch_bytes(p, last - first).
struct ReconstructKernels {
  int32_t panel;
  int64_t (*scratch_bytes)(const ReconstructProblem& p, int64_t rows);
  void (*pack)(const DistanceProblem& p, const DistanceGroup& g, int64_t panel, void* scratch);
  void (*forward)(const ReconstructProblem& p, const DistanceGroup& g, int32_t first, int32_t last, void* scratch);
  void (*backward)(const ReconstructProblem& p, const DistanceGroup& g, int32_t first, int32_t last, void* dy, void* moved,
                   void* pulled, void* scratch);
};

}  // namespace vitkern
