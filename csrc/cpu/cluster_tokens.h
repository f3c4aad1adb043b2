// What the glue hands to the clustering kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "distances.h"

namespace vitkern {

enum class Linkage : int32_t { average, single, complete };

// One call. Results of a token stand at sample * tokens + position.
struct ClusterProblem {
  DistanceProblem distances;
  int32_t tokens, neighbors;
  const void* weight;  // Acc [B][N], for sums
  void* value;         // Acc [B][N]
  int32_t* place;      // [B][N]
};

// `pack` writes one panel of a group's columns. The others work on rows [first, last) of a group whose columns are packed;
// `scratch` is aligned to 64 bytes and holds scratch_bytes(p, last - first).
//   nearest: value = the least distance, place = the first column that has it
//   spread:  value = the sum of the `neighbors` least distances, the row itself at 0; rows = columns
//   before:  value = the least distance to a column that stands before the row; rows = columns
//   sums:    value = the sum of weight times distance; rows = columns
// `agglomerate` joins `count` listed tokens of a sample until k clusters remain; root [count] gets the place of the first
// token of each one's cluster; its scratch holds agglomerate_bytes.
struct ClusterKernels {
  int32_t panel;
  int64_t (*scratch_bytes)(const ClusterProblem& p, int64_t rows);
  void (*pack)(const DistanceProblem& p, const DistanceGroup& g, int64_t panel, void* scratch);
  void (*nearest)(const ClusterProblem& p, const DistanceGroup& g, int32_t first, int32_t last, void* scratch);
  void (*spread)(const ClusterProblem& p, const DistanceGroup& g, int32_t first, int32_t last, void* scratch);
  void (*before)(const ClusterProblem& p, const DistanceGroup& g, int32_t first, int32_t last, void* scratch);
  void (*sums)(const ClusterProblem& p, const DistanceGroup& g, int32_t first, int32_t last, void* scratch);
  int64_t (*agglomerate_bytes)(int64_t count, int64_t width);
  void (*agglomerate)(const RowsView& x, int32_t width, const DistanceGroup& g, int32_t k, Linkage linkage, int32_t* root,
                      void* scratch);
};

}  // namespace vitkern
