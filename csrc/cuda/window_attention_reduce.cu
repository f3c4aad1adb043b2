// window_attention, backward, second part: adds what the blocks left behind, in a fixed order.
#include "window_attention_bwd.cuh"

namespace vitkern {
namespace {

constexpr int kElements = 32, kSlices = 8;  // of a block: neighbouring elements, interleaved slices of the runs

// Where the sum of element `m` of the records of a key head belongs; null for padding and for what is not wanted.
__device__ float* destination(const WindowBackwardParams& p, const BackwardRecord& record, int kv_head, int64_t m,
                              float* dense) {
  const WindowParams& w = p.w;
  if (m >= record.pads) {
    const int64_t i = m - record.pads;
    if (i < w.d) return p.dk_pad == nullptr ? nullptr : p.dk_pad + int64_t(kv_head) * w.d + i;
    return p.dv_pad == nullptr ? nullptr : p.dv_pad + int64_t(kv_head) * w.dv + i - w.d;
  }
  const int head = kv_head * w.group + int(m / record.head_floats);
  const int r = int(m % record.head_floats);
  if (r >= record.tau) return r == record.tau && p.dlogit_scale != nullptr ? p.dlogit_scale + head : nullptr;
  if (p.dbias == nullptr) return nullptr;
  const int threads = record.warps * 32, n = r / 4 / threads, c = r % 4;
  const Lane writer = lane_of(r / 4 % threads);
  const int i = fragment_row(writer, c), j = fragment_column(writer, n, c);
  return i < w.map.size && j < w.map.size ? dense + (int64_t(head) * w.map.size + i) * w.map.size + j : nullptr;
}

// Grid: (key head, 32 elements of the record). Slice s of a block adds the runs s, s + 8, s + 16 ...
__global__ void __launch_bounds__(kElements* kSlices)
    window_attention_reduce_kernel(const WindowBackwardParams p, const BackwardRecord record, float* dense) {
  float* slices = reinterpret_cast<float*>(dynamic_shared());  // [kSlices][kElements]
  const int element = threadIdx.x % kElements, slice = threadIdx.x / kElements;
  const int kv_heads = p.w.heads / p.w.group, kv_head = blockIdx.x % kv_heads;
  const int64_t m = int64_t(blockIdx.x / kv_heads) * kElements + element;
  float* to = m < record.floats ? destination(p, record, kv_head, m, dense) : nullptr;
  const bool tau = m < record.pads && m % record.head_floats == record.tau;
  float sum = 0.0f;
  if (to != nullptr) {
    const float* from = p.workspace + kv_head * record.floats + m;
#pragma unroll 4
    for (int64_t run = slice; run < p.runs; run += kSlices) {
      const float* x = from + run * kv_heads * record.floats;
      sum += x[0];
      if (tau)
        for (int warp = 1; warp < record.warps; ++warp) sum += x[warp];
    }
  }
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || to == nullptr) return;
  for (int i = 1; i < kSlices; ++i) sum += slices[i * kElements + element];
  *to = sum;
}

// dtable[r, h] = sum of dbias[h, i, j] over index[i, j] = r. One warp per (r, h); grid: 8 of them per block.
__global__ void __launch_bounds__(256) window_attention_table_kernel(const WindowBackwardParams p, const float* dense) {
  const WindowParams& w = p.w;
  const int64_t task = int64_t(blockIdx.x) * 8 + threadIdx.x / 32, row = task / w.heads;
  const int head = int(task % w.heads), lane = threadIdx.x % 32, n = w.map.size;
  float sum = 0.0f;
  if (row < w.table_rows)
    for (int e = lane; e < n * n; e += 32)
      if (table_row(w, e / n, e % n) == row) sum += dense[int64_t(head) * n * n + e];
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bits);
  if (row < w.table_rows && lane == 0) p.dbias[row * w.heads + head] = sum;
}

}  // namespace

void reduce_partials(const WindowBackwardParams& p, const BackwardRecord& record, void* stream) {
  if (!p.dbias && !p.dlogit_scale && !p.dk_pad && !p.dv_pad) return;
  const int kv_heads = p.w.heads / p.w.group;
  float* dense = p.w.index == nullptr ? p.dbias : p.workspace + p.runs * kv_heads * record.floats;
  launch("window_attention_reduce", window_attention_reduce_kernel,
         (record.floats + kElements - 1) / kElements * kv_heads, kElements * kSlices, kElements * kSlices * 4, stream,
         p, record, dense);
  if (p.dbias != nullptr && p.w.index != nullptr)
    launch("window_attention_table", window_attention_table_kernel, (p.w.table_rows * p.w.heads + 7) / 8, 256, 0,
           stream, p, static_cast<const float*>(dense));
}

}  // namespace vitkern
