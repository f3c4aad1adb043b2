// The host side of the CUDA kernels of window attention: parameters and entry points. Plain C++, no torch, no CUDA.
#pragma once
#include <stdint.h>

#include "../common/window.h"
#include "element.h"

namespace vitkern {

constexpr int kMaxTokens = 64;  // of a window
constexpr int kMaxWidth = 128;  // D and Dv

// A map [B, *L, H, D], or [B, *L, H], with any strides, in elements; axes are right-aligned. The last dimension is
// contiguous; `vector` says that every row starts on a 16-byte boundary. Products are taken in 64 bits.
struct TokenView {
  void* data;
  int64_t batch, head;
  int32_t axis[kMaxAxes];
  int32_t vector;
};

enum class BiasType : int32_t { none, float32, bfloat16, float16 };

struct WindowParams {
  WindowWalk map;
  int32_t heads, group;       // query heads, query heads per key head
  int32_t d, dv;              // multiples of 8
  int64_t windows;            // of the whole batch
  int64_t windows_per_block;
  TokenView q, k, v, out, lse;
  const void* bias;           // [H, N, N], or a table [R, H] where index is given
  const int32_t* index;       // [N, N]
  int64_t bias_stride[3], index_stride[2], table_rows;
  BiasType bias_type;
  const float* logit_scale;   // [H]
  const void *k_pad, *v_pad;  // [Hk, D], [Hk, Dv], contiguous
  const int64_t* seed;
  const int64_t* first_head;  // the number of head 0 in dropout, and times 2^32 that of image 0, or null
  uint64_t dropout_threshold; // 0: no dropout
  float dropout_scale;        // 1 / (1 - p)
  float scale, mask_value, cosine_max, cosine_eps;
  int32_t pad_visible;
};

struct WindowBackwardParams {
  WindowParams w;             // lse is an input; out is not used
  TokenView dout, dlse, dq, dk, dv;  // dlse.data may be null
  // float32, contiguous, null where not wanted: [H, N, N] or [R, H]; [H]; [Hk, D]; [Hk, Dv].
  float *dbias, *dlogit_scale, *dk_pad, *dv_pad;
  float* workspace;
  int64_t runs;               // of windows: blocks per key head
};

// out and lse (null: not wanted) of p.
void window_attention_forward(WindowParams p, Element element, void* stream);

// dq, dk, dv, dbias, dlogit_scale, dk_pad and dv_pad of p.
void window_attention_backward(WindowBackwardParams p, Element element, void* stream);

// Floats of scratch that the backward needs on the current GPU; `windows` counts the whole batch.
int64_t window_attention_workspace(int64_t heads, int64_t kv_heads, int64_t windows, int64_t tokens, int64_t d,
                                   int64_t dv);

}  // namespace vitkern
