// linear_attention, forward, on tensor cores: sums over runs of keys, the runs added in order, then the queries.
//
// Products are tf32 with float32 sums: q, k and v of 16 bits are tf32 numbers themselves, features that are not and the
// sums S enter as pairs of them. No block waits for another and nothing is added atomically: where the sums of the runs
// are few and small each block of queries adds them for itself, else a launch in between does, in the same order.
#include "linear_attention_sums.cuh"

namespace vitkern {
namespace {

// The outputs of a run of queries. Grid: sequences x heads (fastest), query_splits.
template <class T, class S>
__global__ void __launch_bounds__(S::kQueryThreads, S::kBlocks)
    linear_queries_kernel(const LinearParams p, int splits) {
  unsigned char* shared = dynamic_shared();
  float* s = reinterpret_cast<float*>(shared);
  const float* values = s + S::kWidth * (S::kPitch + 1);
  const Lane me = this_lane();
  const int units = p.sequences * p.heads, unit = blockIdx.x % units, part = blockIdx.x / units;
  const int sequence = unit / p.heads, head = unit % p.heads;
  const Run run = run_of(p.queries, sequence, part, p.query_splits);
  const int64_t q_at = head_offset(p, p.q, sequence, head), out_at = head_offset(p, p.out, sequence, head);
  unsigned char* own = shared + S::kSums + me.warp * 16 * S::kRowBytes;  // 16 rows in each of two stages

  const auto load = [&](int tile) {
    load_rows<S>(p.queries, p.q, q_at, run, tile, p.d, own + tile % 2 * S::kMatrixBytes, me);
    copy_commit();
  };
  load(0);
  load_sums<S>(p, sequence * (p.heads / p.group) + head / p.group, splits, part == 0 && head % p.group == 0, s);
  __syncthreads();
  const float n = values[S::kWidth];
  for (int tile = 0; run.start + tile * kLinearTile < run.stop; ++tile) {
    unsigned char* q = own + tile % 2 * S::kMatrixBytes;
    load(tile + 1);
    copy_wait<1>();
    __syncwarp();
    float num[S::kGroups][4] = {}, dot[2] = {}, inverse[2];
    multiply_features<T, S>(p, q, s, me, num, dot, inverse);
    const Factors low = factors_of(p, dot[0], n), high = factors_of(p, dot[1], n);
    const float of_num[2] = {low.of_num * inverse[0], high.of_num * inverse[1]};
    const float of_values[2] = {low.of_values, high.of_values};
    __syncwarp();  // the rows of Q have been read
#pragma unroll
    for (int c = 0; c < S::kGroups; ++c) {
      if (c * 8 >= p.e) break;
      const float2 v = *reinterpret_cast<const float2*>(values + c * 8 + 2 * me.t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = num[c][2 * h] * of_num[h] + v.x * of_values[h], y = num[c][2 * h + 1] * of_num[h] + v.y * of_values[h];
        word_of<S>(q, c, h, me) = pack2<T>(x, y);
      }
    }
    __syncwarp();  // the results are complete; a lane stores the chunks into which it will load
    store_rows<S>(p.queries, p.out, out_at, run, tile, p.e, q, me);
  }
  copy_wait_all();
}

}  // namespace

void linear_attention_forward(const LinearParams& p, Element element, void* stream) {
  const int64_t blocks = int64_t(p.sequences) * p.heads * p.query_splits;
  if (p.sequences == 0) return;
  with_tile(p, element, [&](auto type, auto shape) {
    using T = decltype(type);
    using S = decltype(shape);
    const int splits = sum_tokens<T, S, false>(p, {}, p.splits, blocks, stream);
    launch("linear_attention_queries", linear_queries_kernel<T, S>, blocks, S::kQueryThreads, S::kQueryBytes, stream, p,
           splits);
  });
}

}  // namespace vitkern
