// window_attention, forward: softmax attention inside windows of at most 64 tokens, on tensor cores.
//
// Grid: blockIdx.x = run of windows * heads + head, so that neighbouring heads, which share cache lines, run together.
// A block reads its bias once and walks over its windows; while it computes one, the next is on its way.
#include "window_attention.cuh"

namespace vitkern {
namespace {

// Shared memory of a block:
//   stages x (Q | K | V) | bias fragments | stages x info | packed positions | two cursors, used in turn
template <class S>
struct ForwardLayout {
  static constexpr int kStageBytes = 3 * S::kMatrixBytes;
  static constexpr int kBias = S::kStages * kStageBytes;
  static constexpr int kInfo = kBias + S::kBiasBytes;
  static constexpr int kPlace = kInfo + S::kStages * kMaxTokens;
  static constexpr int kCursor = kPlace + kMaxTokens * 4;
  static constexpr int kBytes = kCursor + 2 * 32;
  // Per multiprocessor: what registers and, on Hopper and Blackwell, shared memory allow.
  static constexpr int kBlocks =
      S::kWidth == 128 ? 2 : S::kWidth == 64 ? 3 : S::kTiles == 8 ? 4 : S::kTiles == 7 ? 5 : 8;
};

template <class T, class S>
__device__ __forceinline__ void load_window(const WindowParams& p, int head, const WindowCursor& cursor, int stage,
                                            unsigned char* shared, const Lane& me) {
  using Layout = ForwardLayout<S>;
  const uint32_t* place = reinterpret_cast<const uint32_t*>(shared + Layout::kPlace);
  unsigned char* q = shared + stage * Layout::kStageBytes;
  const int kv_head = head / p.group;
  for_own_chunks<S>(p, cursor, place, me, [&](int row, int chunk, bool real, const int32_t* at) {
    load_row_chunk<S>(p, p.q, head, p.d, cursor, nullptr, q, row, chunk, real, at);
    load_row_chunk<S>(p, p.k, kv_head, p.d, cursor, p.k_pad, q + S::kMatrixBytes, row, chunk, real, at);
    load_row_chunk<S>(p, p.v, kv_head, p.dv, cursor, p.v_pad, q + 2 * S::kMatrixBytes, row, chunk, real, at);
  });
  if (window_is_special(p.map, cursor))
    fill_info(p, cursor, place, shared + Layout::kInfo + stage * kMaxTokens, me);
}

// Turns scores into unnormalised weights 2^(s - top), in place; returns per row 1 / their sum (0 for a row that sees
// no key) and the log-sum-exp. A NaN among the scores of a row makes its sum NaN.
template <class S>
__device__ __forceinline__ void softmax_rows(float (&s)[S::kTiles][4], float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int c = 2 * half; c < 2 * half + 2; ++c) sum += s[n][c] = exp2_approx(s[n][c] - base);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
    lse[half] = sum == 0.0f ? -INFINITY : (base + log2_approx(sum)) * kLn2;
  }
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, ForwardLayout<S>::kBlocks)
    window_attention_forward_kernel(const WindowParams p) {
  using Layout = ForwardLayout<S>;
  unsigned char* shared = dynamic_shared();
  float4* bias = reinterpret_cast<float4*>(shared + Layout::kBias);
  uint32_t* place = reinterpret_cast<uint32_t*>(shared + Layout::kPlace);
  const Lane me = this_lane();
  const int head = blockIdx.x % p.heads;
  WindowCursor* cursors = reinterpret_cast<WindowCursor*>(shared + Layout::kCursor);
  const int64_t first = blockIdx.x / p.heads * p.windows_per_block, rest = p.windows - first;

  clear_shared(shared, Layout::kBytes);
  __syncthreads();
  fill_places(p, place);
  const float factor = score_factor(p, head);
  const int count = int(rest < p.windows_per_block ? rest : p.windows_per_block);
  const uint32_t bias_hidden = load_bias<S>(p, head, bias, me);
  if (me.thread == 0) cursors[0] = window_cursor(p.map, first);

  // With two stages, turn -1 only starts the load of window 0, and every turn starts that of the next.
  for (int i = 1 - S::kStages; i < count; ++i) {
    const int turn = i & 1, stage = S::kStages == 2 ? turn : 0;
    const WindowCursor& cursor = cursors[turn];  // stays in shared memory: registers are scarce
    unsigned char* q = shared + stage * Layout::kStageBytes;
    unsigned char *k = q + S::kMatrixBytes, *v = k + S::kMatrixBytes;
    if (S::kStages == 1) {
      __syncthreads();  // the window before has been read by all
      load_window<T, S>(p, head, cursor, stage, shared, me);
    }
    copy_wait_all();
    if (p.logit_scale != nullptr && i >= 0) {
      __syncwarp();
      normalize_own_rows<T, S>(p, q, nullptr, me);
      normalize_own_rows<T, S>(p, k, nullptr, me);
    }
    __syncthreads();  // this window is complete; the other stage has been read by all
    WindowCursor ahead = cursors[i < 0 ? 0 : turn];
    if (i >= 0) {
      next_window(p.map, &ahead);
      if (me.thread == 0) cursors[turn ^ 1] = ahead;
    }
    if (S::kStages == 2 && i + 1 < count) load_window<T, S>(p, head, ahead, stage ^ 1, shared, me);
    if (i < 0) continue;

    uint32_t hidden = bias_hidden, apart = 0;
    if (window_is_special(p.map, cursor)) {
      window_masks<S>(p, shared + Layout::kInfo + stage * kMaxTokens, me, &hidden, &apart);
      if (p.mask_value == -INFINITY) {
        hidden |= apart;
        apart = 0;
      }
    }
    float s[S::kTiles][4], inverse[2], lse[2];
    product_with_rows<T, S>(s, q, k, p.d, me);
    finish_scores<S>(s, factor, bias, hidden, apart, p.mask_value * kLog2E, me);
    softmax_rows<S>(s, inverse, lse);

    if (p.lse.data != nullptr) {
      // Lane r < 16 writes row r, which lane 4 (r % 8) holds.
      const float low = __shfl_sync(0xFFFFFFFFu, lse[0], me.lane * 4 & 31);
      const float high = __shfl_sync(0xFFFFFFFFu, lse[1], me.lane * 4 & 31);
      const int row = me.warp * 16 + me.lane;
      int32_t at[kMaxAxes];
      if (me.lane < 16 && row < p.map.size && token_at(p.map, cursor, place[row], at))
        static_cast<float*>(p.lse.data)[offset_of(p.lse, cursor.image, at, p.map.rank) + head * p.lse.head] =
            me.lane < 8 ? low : high;
    }
    if (p.dropout_threshold != 0) {
      const uint32_t tokens[2] = {token_number(p, cursor, place[fragment_row(me, 0)]),
                                 token_number(p, cursor, place[fragment_row(me, 2)])};
      const uint32_t keep = dropout_bits<S>(p, cursor.image, head, tokens, me);
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (!(keep >> (n * 4 + c) & 1)) s[n][c] *= 0.0f;
      inverse[0] *= p.dropout_scale;
      inverse[1] *= p.dropout_scale;
    }
    uint32_t packed[S::kSteps * 4] = {};  // the weights as fragments of A; 0 beyond the last group of keys
#pragma unroll
    for (int i = 0; i < S::kTiles * 2; ++i) packed[i] = pack2<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
    const auto weights = [&](int step, uint32_t(&a)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = packed[step * 4 + i];
    };
    const auto seen = [&](int step, uint32_t(&a)[4]) { seen_keys<T>(hidden, step, a); };
    const bool some_hidden = __any_sync(0xFFFFFFFFu, hidden != 0);
    unsigned char* staged = q;  // only this warp reads its rows of Q, and has done so
    __syncwarp();
    const unsigned char* v_row = transposed_row<S>(v, me);
#pragma unroll
    for (int pair = 0; pair < S::kWidth / 16; ++pair) {
      if (pair * 16 >= p.dv) break;
      float o[2][4];
      weigh_values<T, S, Values::all>(o, v_row + pair * 32, weights);
      if (some_hidden) {
        // Weight 0 times NaN or infinity is NaN, which must not reach rows that do not see the key.
        float probe = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) probe += o[i / 4][i % 4] * 0.0f;
        if (__any_sync(0xFFFFFFFFu, probe != 0.0f)) {
          float bad[2][4];
          weigh_values<T, S, Values::finite>(o, v_row + pair * 32, weights);
          weigh_values<T, S, Values::not_finite>(bad, v_row + pair * 32, seen);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (bad[i / 4][i % 4] > 0.0f) o[i / 4][i % 4] = NAN;
        }
      }
      unsigned char* row = staged + (me.warp * 16 + me.g) * S::kRowBytes + me.t * 4 + pair * 32;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 0 o turns an infinity, which only an infinite value can give, into NaN.
        const float x = fmaf(o[i / 2][i % 2 * 2], 0.0f, o[i / 2][i % 2 * 2] * inverse[i % 2]);
        const float y = fmaf(o[i / 2][i % 2 * 2 + 1], 0.0f, o[i / 2][i % 2 * 2 + 1] * inverse[i % 2]);
        *reinterpret_cast<uint32_t*>(row + i / 2 * 16 + i % 2 * 8 * S::kRowBytes) = pack2<T>(x, y);
      }
    }
    __syncwarp();
    store_rows<S>(p, p.out, head, p.dv, cursor, staged, place, me);
  }
}

}  // namespace

void window_attention_forward(WindowParams p, Element element, void* stream) {
  const auto run = [&](auto type, auto shape) {
    using T = decltype(type);
    using S = decltype(shape);
    using Layout = ForwardLayout<S>;
    // One wave: as many runs of windows as the GPU holds blocks at a time.
    const int64_t room = int64_t(multiprocessors()) * Layout::kBlocks / p.heads;
    const int64_t runs = room < 1 ? 1 : room;
    p.windows_per_block = (p.windows + runs - 1) / runs;
    const int64_t blocks = (p.windows + p.windows_per_block - 1) / p.windows_per_block * p.heads;
    launch("window_attention_forward", window_attention_forward_kernel<T, S>, blocks, (p.map.size + 15) / 16 * 32,
           Layout::kBytes, stream, p);
  };
  if (p.windows == 0 || p.heads == 0) return;
  if (element == Element::bfloat16) with_tile<Bf16>(p, run);
  else with_tile<Half>(p, run);
}

}  // namespace vitkern
