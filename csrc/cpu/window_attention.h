// What the glue hands to the window attention kernels: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"
#include "../common/window.h"

namespace vitkern {

// A tensor [B, *L, H, D] or [B, *L, H] on the map: strides in elements. data is null where the tensor is absent.
struct MapView {
  char* data;
  Dtype dtype;
  int64_t batch, axis[kMaxAxes], head, dim;
};

// One call. Acc below is float, or double for double tensors.
struct WindowProblem {
  WindowMap map;
  int64_t batch;
  int32_t heads, kv_heads, d, dv;
  int32_t padded;  // keys of a window, rounded up to the vector length
  MapView q, k, v;
  MapView out, lse;                // forward writes both, backward reads lse
  MapView dout, dlse, dq, dk, dvalue;  // backward
  const void* bias;                // Acc [heads or 1][N or 1][padded], -inf in the padding columns
  int64_t bias_head, bias_row;     // its strides, 0 where broadcast
  bool bias_hides;                 // it holds a -inf before the padding columns
  bool pad_visible;
  const void *k_pad, *v_pad;       // Acc [kv_heads][d], [kv_heads][dv], or null for 0
  const void* temperature;         // Acc [heads]: the factor of cosine scores, or null for plain scores
  double scale, mask_value, eps, dropout_p;
  uint64_t seed;
};

// Sums over the windows of one chunk that backward leaves behind; a null pointer is not wanted.
struct WindowSums {
  void* bias;         // Acc [heads][N][padded]
  void* temperature;  // Acc [heads]: sum of dS a
  void *k_pad, *v_pad;  // Acc [kv_heads][d], [kv_heads][dv]
};

// Bytes of scratch that one thread needs, and the work on windows [first, last) of all images (image-major) and
// kv heads [head_first, head_last). `scratch` is aligned to 64 bytes and holds scratch_bytes(p, backward).
struct WindowKernels {
  int64_t (*scratch_bytes)(const WindowProblem& p, bool backward);
  void (*forward)(const WindowProblem& p, int64_t first, int64_t last, int32_t head_first, int32_t head_last, void* scratch);
  void (*backward)(const WindowProblem& p, int64_t first, int64_t last, int32_t head_first, int32_t head_last,
                   const WindowSums& sums, void* scratch);
};

}  // namespace vitkern
