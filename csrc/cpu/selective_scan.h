// What the glue hands to the kernels of selective scans: plain pointers, strides and sizes.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace vitkern {

// u, z [N, L, R or 1, C], delta [N, L, R, C or K], b, c [N, L, R, G, S]: strides in elements. data is null where the tensor is
// absent; the stride over routes is 0 where they share one.
struct ScanView {
  char* data;
  Dtype dtype;
  int64_t batch, token, route, group, dim;
};

constexpr int32_t kScanVectors = 2;  // of channels in a block

// One call. Acc is float or double, as the kernels. The channels of a group are cut into blocks of kScanVectors vectors, and
// `pitch` is the channels of all blocks: arrays over channels stand block by block, padded with zeros.
struct ScanProblem {
  ScanView u, delta, b, c, z, out, dout, du, ddelta, dz;
  const int32_t *routes, *bounds;         // [R][L]; [W + 1], from 0 to L
  int64_t batch, pitch;
  int32_t length, channels, states, count, groups, windows, group_blocks;
  int32_t rank;                           // of delta, 0: delta is given
  bool softplus, stack, own_u, own_z;     // own: every route has one
  double factor;                          // of the sum over routes
  const void *a, *d, *bias, *weight;      // Acc [R][S][pitch], [R][pitch] twice, [R][K][pitch]; all but a: null for none
  void *first, *last;                     // Acc [N][R][W][S][pitch]: the states before and behind the visits; first: null for 0
  void *dfirst, *dlast;                   // their gradients, or null
  void *da, *dd, *dbias, *dweight;        // Acc [N][R][S][pitch], [N][R][pitch] twice, [N][R][K][pitch]
  void *db, *dc, *dlow;                   // Acc [N][blocks][L][R][S] twice and [..][K]: the part of each block
};

// One block of channels of one sample; `scratch` is aligned to 64 bytes and holds scratch_bytes(p).
struct ScanKernels {
  int32_t (*width)();  // channels of a block
  int64_t (*scratch_bytes)(const ScanProblem& p);
  void (*forward)(const ScanProblem& p, int64_t sample, int32_t block, void* scratch);
  void (*backward)(const ScanProblem& p, int64_t sample, int32_t block, void* scratch);
};

}  // namespace vitkern
