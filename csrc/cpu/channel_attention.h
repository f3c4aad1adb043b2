// What the glue hands to the kernels of channel attention: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace vitkern {

// A tensor [B, Y, X, H, D]: strides in elements. data is null where the tensor is absent.
struct ChannelView {
  char* data;
  Dtype dtype;
  int64_t batch, row, column, head, dim;
};

enum class ChannelNormalizer : int32_t { softmax, relu, none, plus1 };

constexpr int32_t kChannelChunk = 1024;  // tokens whose products are summed before they are added to those of others

// One call. Sums over the tokens of a window are taken chunk by chunk. The matrices of a (sample, window, head) are
// [D][pitch], those of a (sample, chunk, head) likewise; Acc is float or double, as the kernels.
struct ChannelProblem {
  ChannelView q, k, v, out, dout, dq, dk, dv;
  const uint8_t* mask;       // [B][Y * X], 1 for a real token
  const int32_t* order;      // [B][X], with Y = 1
  const int32_t* bounds;     // [windows + 1]: packed sequences, with Y = 1
  const int32_t* first_chunk;  // [windows + 1]
  int64_t batch;
  int32_t rows, columns, heads, d, e, windows, chunks, across, side_y, side_x;  // across: windows beside each other
  bool normalize;
  ChannelNormalizer normalizer;
  int32_t topk_count;
  const int64_t* topk;
  const void *temperature, *topk_weight;      // Acc [H G], [T]; null for 1
  int32_t groups;                             // G: rows of a matrix that have a temperature of their own, D / G each
  double scale, eps;
  int64_t d_pitch, pitch;                     // D and E to whole vectors
  void *gram, *squares;                       // Acc [B][W][H][D][E], [B][W][H][D + E], contiguous
  void *partial, *partial_squares;            // Acc [B][C][H][D][pitch], [B][C][H][d_pitch + pitch]
  void* p;                                    // Acc [B][W][H][D][pitch]: P
  const void *dgram, *dsquares;               // as gram and squares, or null
  void *slope, *slope_squares;                // Acc [B][W][H][D][pitch], [B][W][H][d_pitch + pitch]: d gram, 2 d squares
  void *dtemperature, *dtopk_weight;          // Acc [B][W][H G], [B][W][H][T]
};

// One chunk and the heads first..last, or one window and head. `scratch` is aligned to 64 bytes and holds scratch_bytes(p).
using ChannelUnit = void (*)(const ChannelProblem& p, int64_t sample, int32_t chunk, int32_t first, int32_t last, void* scratch);
using ChannelMatrix = void (*)(const ChannelProblem& p, int64_t sample, int32_t window, int32_t head, void* scratch);
struct ChannelKernels {
  int64_t (*scratch_bytes)(const ChannelProblem& p);
  ChannelUnit products, apply;             // forward: q k and the squares; o
  ChannelMatrix weights;                   // gram, squares and P from the partial sums
  ChannelUnit back_products, gradients;    // backward: dout v; dq, dk, dv
  ChannelMatrix slopes;                    // slope, slope_squares, P and the parameters' gradients
};

}  // namespace vitkern
