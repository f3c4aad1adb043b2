// What the glue hands to the kernels of neighbourhood attention: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "window_attention.h"

namespace vitkern {

constexpr int kNearAxes = 3;

// The maps [B, L0, L1, L2, H, D] of a call. kNearA: scores or weights, [B, L0, L1, L2, H, n].
enum NearView {
  kNearQ, kNearK, kNearV, kNearOut, kNearLse, kNearA, kNearDout, kNearDlse, kNearDq, kNearDa, kNearViews
};
// neighborhood_attention, or one of its halves.
enum class NearPart : int32_t { fused, qk, av };

// One call. Tokens of equal coordinate mod dilation form a group, a map of its own. The queries of a group are cut into tiles of
// as many as a vector has lanes; a tile sees a box of keys, and after it the extra keys. Acc is float, or double for double tensors.
struct NearProblem {
  NearPart part;
  int32_t length[kNearAxes], kernel[kNearAxes], dilation[kNearAxes];
  const int32_t *start[kNearAxes], *end[kNearAxes];  // [length]: the first slot of a coordinate, one behind its last visible key
  int32_t tile[kNearAxes], most[kNearAxes];          // sides of a tile, and of the largest box that one sees
  int32_t band_axis, band;                           // a unit of work: `band` rows of a group along this axis
  int64_t batch, groups, bands;                      // units: batch x groups x bands
  int32_t heads, kv_heads, d, dv, slots, extras;
  MapView view[kNearViews];
  MapView k_extra, v_extra;                          // [B|1, E, Hk, D]: axis[0] is that of the keys
  const uint8_t* mask;                               // [B][L0 L1 L2], 1 for a key
  const void* rpb;                                   // Acc [heads][entries], or null
  int64_t entries;                                   // of rpb: product of 2 K - 1
  bool table;                                        // rpb is laid out by lanes once for all tiles of a head
  double scale;
  void *dk, *dv_sum;                                 // Acc [B][L0 L1 L2][kv_heads][d or dv], added to; null: not wanted
};

// Sums over the units of one task that backward adds to; null: not wanted.
struct NearSums {
  void* rpb;                // Acc [heads][entries]
  void *k_extra, *v_extra;  // Acc [E][kv_heads][d], [E][kv_heads][dv]
};

// The units first .. last - 1 of one kv head; backward takes those whose band is even (colour 0) or odd. `scratch` is aligned to 64
// bytes, zero, and holds scratch_bytes(p, backward).
struct NearKernels {
  int64_t (*scratch_bytes)(const NearProblem& p, bool backward);
  void (*forward)(const NearProblem& p, int64_t first, int64_t last, int32_t kv_head, void* scratch);
  void (*backward)(const NearProblem& p, int64_t first, int64_t last, int32_t colour, int32_t kv_head, const NearSums& sums,
                   void* scratch);
};

}  // namespace vitkern
