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

// The unit of scores, bias and mask inside the kernels: log 2 for float, whose exponential is then 2^x without an
// argument reduction; 1 for double.
template <typename Acc>
static constexpr double score_unit() {
  return sizeof(Acc) == 4 ? 0.6931471805599453 : 1.0;
}

// The maps of a call. Forward writes kOut and kLse; backward reads kDout and kDlse and writes the rest.
enum View { kQ, kK, kV, kOut, kLse, kDout, kDlse, kDq, kDk, kDv, kViews };

// One call. Acc below is float, or double for double tensors.
struct WindowProblem {
  WindowMap map;
  int64_t batch;
  int32_t heads, kv_heads, d, dv;
  int32_t padded;  // keys of a window, rounded up to the vector length
  MapView view[kViews];            // by View
  const void* bias;                // Acc [heads or 1][N or 1][padded] in score units, -inf in the padding columns
  int64_t bias_head, bias_row;     // its strides, 0 where broadcast
  bool pad_visible;
  const void *k_pad, *v_pad;       // Acc [kv_heads][d], [kv_heads][dv], or null for 0
  const double* temperature;       // [heads]: the factor of cosine scores, or null for plain scores
  double scale, mask_value, eps, dropout_p;
  uint64_t seed;
  uint32_t first_head, first_image;  // of the random numbers
};

// Sums over the windows of one chunk that backward leaves behind; a null pointer is not wanted.
struct WindowSums {
  void* bias;         // Acc [heads][N][padded]
  void* temperature;  // Acc [heads]: sum of dS a
  void *k_pad, *v_pad;  // Acc [kv_heads][d], [kv_heads][dv]
};

// Bytes of scratch that one thread needs, and the work on windows [first, last) of all images (image-major) and
// kv heads [head_first, head_last). `scratch` is aligned to 64 bytes, holds
// scratch_bytes(p, backward), and is zero before its first use with p.
struct WindowKernels {
  int64_t (*scratch_bytes)(const WindowProblem& p, bool backward);
  void (*forward)(const WindowProblem& p, int64_t first, int64_t last, int32_t head_first, int32_t head_last, void* scratch);
  void (*backward)(const WindowProblem& p, int64_t first, int64_t last, int32_t head_first, int32_t head_last,
                   const WindowSums& sums, void* scratch);
};

}  // namespace vitkern
