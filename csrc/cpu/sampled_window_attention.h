// What the glue hands to the kernels of sampled window attention: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "window_attention.h"

namespace vitkern {

// Places [B, nWy, nWx, K, G, 2]: strides in elements. data is null where the tensor is absent.
struct SampledPlaces {
  const char* data;
  Dtype dtype;
  int64_t batch, row, column, sample, group, axis;
};
// A bias of every window, [B, nW, H, N, K].
struct SampledBias {
  char* data;
  Dtype dtype;
  int64_t batch, window, head, query, sample;
};

constexpr int32_t kSampledRows = 64;  // queries of a block: a window is taken in blocks of its queries

// One call. Acc is float or double, as the kernels. A part is the channels of a head that share their places.
struct SampledProblem {
  int64_t batch;
  int32_t heads, kv_heads, d, dv, parts, groups;
  int32_t height, width, key_height, key_width;
  int32_t window[2], windows[2];  // sides of a window, and windows along each axis
  int32_t n, padded, samples;     // queries of a window, rounded up to whole vectors or blocks; samples of a window
  bool mask;                      // samples outside the map are hidden
  double scale;
  MapView q, k, v, out, dout, dq, dk, dv_map;
  SampledPlaces coords, coords_v;  // coords_v absent: those of coords
  const void* bias;                // Acc [heads][samples][padded] of every window, or null
  SampledBias of_window, dof_window;
  void *dcoords, *dcoords_v;  // Acc [B][nW][samples][heads][parts][2], or null
};

// `scratch` is aligned to 64 bytes, zero, and holds scratch_bytes(p, backward).
struct SampledKernels {
  int64_t (*scratch_bytes)(const SampledProblem& p, bool backward);
  int64_t (*slice)(const SampledProblem& p, bool value);  // numbers of a kv head's gradient: [cells][whole vectors]
  // out of the windows first .. last - 1 of the batch, of the heads of some kv heads
  void (*forward)(const SampledProblem& p, int64_t first, int64_t last, int32_t first_head, int32_t last_head, void* scratch);
  // the gradients of some windows of an image and kv head. dbias [heads][samples][padded], dk and dv [slice] are added to; null: not wanted
  void (*backward)(const SampledProblem& p, int64_t image, int32_t kv_head, int32_t first, int32_t last, void* dbias, void* dk, void* dv,
                   void* scratch);
  // the sum of `count` slices, `step` numbers apart, in the map of dk or dv
  void (*finish)(const SampledProblem& p, bool value, int64_t image, int32_t kv_head, const void* slices, int64_t count, int64_t step,
                 void* scratch);
};

}  // namespace vitkern
