// window_attention, backward: all gradients of one pass over the windows, without atomics.
//
// Grid: blockIdx.x = run of windows * key heads + key head. Per window a warp recomputes the weights P of its 16 query
// rows from lse, forms dS, and passes P and dS through shared memory, so that it can then sum dk and dv of its 16 key
// rows over all queries. The gradient of the bias stays in registers over the whole run, is written once per block in
// fragment order, and window_attention_reduce.cu adds the blocks in a fixed order.
#include "window_attention_bwd.cuh"

namespace vitkern {
namespace {

// Shared memory of a block:
//   stages x (Q | K | V | dO) | P | dS | bias fragments | stages x (lse | dlse) | 1 / |q| | 1 / |k| |
//   warps x (dk_pad | dv_pad) | packed positions | stages x info | two cursors, used in turn
template <class S>
struct BackwardLayout {
  static constexpr int kStageBytes = 4 * S::kMatrixBytes;
  static constexpr int kWeightRowBytes = 2 * S::kRows + 16;
  static constexpr int kP = S::kStages * kStageBytes;
  static constexpr int kDs = kP + S::kRows * kWeightRowBytes;
  static constexpr int kBias = kDs + S::kRows * kWeightRowBytes;
  static constexpr int kLse = kBias + S::kBiasBytes;
  static constexpr int kNorm = kLse + S::kStages * 2 * kMaxTokens * 4;
  static constexpr int kPads = kNorm + 2 * kMaxTokens * 4;
  static constexpr int kPlace = kPads + S::kSteps * 2 * S::kWidth * 4;
  static constexpr int kInfo = kPlace + kMaxTokens * 4;
  static constexpr int kCursor = kInfo + S::kStages * kMaxTokens;
  static constexpr int kBytes = kCursor + 2 * 32;
};

template <class T, class S>
__device__ __forceinline__ void load_window(const WindowBackwardParams& p, int head, const WindowCursor& cursor,
                                            int stage, unsigned char* shared, const Lane& me) {
  using Layout = BackwardLayout<S>;
  const WindowParams& w = p.w;
  const uint32_t* place = reinterpret_cast<const uint32_t*>(shared + Layout::kPlace);
  unsigned char* q = shared + stage * Layout::kStageBytes;
  const int kv_head = head / w.group;
  for_own_chunks<S>(w, cursor, place, me, [&](int row, int chunk, bool real, const int32_t* at) {
    load_row_chunk<S>(w, w.q, head, w.d, cursor, nullptr, q, row, chunk, real, at);
    load_row_chunk<S>(w, w.k, kv_head, w.d, cursor, w.k_pad, q + S::kMatrixBytes, row, chunk, real, at);
    load_row_chunk<S>(w, w.v, kv_head, w.dv, cursor, w.v_pad, q + 2 * S::kMatrixBytes, row, chunk, real, at);
    load_row_chunk<S>(w, p.dout, head, w.dv, cursor, nullptr, q + 3 * S::kMatrixBytes, row, chunk, real, at);
  });
  const int row = me.warp * 16 + me.lane;
  if (me.lane < 16 && row < w.map.size) {
    float* lse = reinterpret_cast<float*>(shared + Layout::kLse) + stage * 2 * kMaxTokens;
    int32_t at[kMaxAxes];
    if (token_at(w.map, cursor, place[row], at)) {
      copy4_async(lse + row, static_cast<const float*>(w.lse.data) +
                                 offset_of(w.lse, cursor.image, at, w.map.rank) + head * w.lse.head);
      if (p.dlse.data != nullptr)
        copy4_async(lse + kMaxTokens + row, static_cast<const float*>(p.dlse.data) +
                                                offset_of(p.dlse, cursor.image, at, w.map.rank) +
                                                head * p.dlse.head);
    } else {
      lse[row] = INFINITY;  // a pad as query: weights 0
      lse[kMaxTokens + row] = 0.0f;
    }
  }
  if (window_is_special(w.map, cursor))
    fill_info(w, cursor, place, shared + Layout::kInfo + stage * kMaxTokens, me);
}

// acc = A B over the first `width` columns of B: `fragment(step, a)` gives 16 rows and 16 columns of A.
template <class T, class S, class Fragment>
__device__ __forceinline__ void accumulate_rows(float (&acc)[S::kWidth / 8][4], const unsigned char* b, int width,
                                                const Lane& me, Fragment fragment) {
#pragma unroll
  for (int n = 0; n < S::kWidth / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  const unsigned char* b_row = transposed_row<S>(b, me);
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t a[4];
    fragment(step, a);
#pragma unroll
    for (int pair = 0; pair < S::kWidth / 16; ++pair) {
      if (pair * 16 >= width) break;
      uint32_t bf[4];
      load_matrix_x4_transposed(bf, b_row + step * 16 * S::kRowBytes + pair * 32);
      mma_16x8x16<T>(acc[2 * pair], a, bf[0], bf[1]);
      mma_16x8x16<T>(acc[2 * pair + 1], a, bf[2], bf[3]);
    }
  }
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, BackwardPlan<S>::kBlocks)
    window_attention_backward_kernel(const WindowBackwardParams p) {
  using Layout = BackwardLayout<S>;
  constexpr int kWords = S::kWidth / 8;
  const WindowParams& w = p.w;
  unsigned char* shared = dynamic_shared();
  unsigned char *weights = shared + Layout::kP, *ds_matrix = shared + Layout::kDs;
  float4* bias = reinterpret_cast<float4*>(shared + Layout::kBias);
  float* norm = reinterpret_cast<float*>(shared + Layout::kNorm);
  uint32_t* place = reinterpret_cast<uint32_t*>(shared + Layout::kPlace);
  WindowCursor* cursors = reinterpret_cast<WindowCursor*>(shared + Layout::kCursor);
  const Lane me = this_lane();
  float* pad_sums = reinterpret_cast<float*>(shared + Layout::kPads) + me.warp * 2 * S::kWidth;
  const int kv_heads = w.heads / w.group, kv_head = blockIdx.x % kv_heads;
  const int64_t first = blockIdx.x / kv_heads * w.windows_per_block, rest = w.windows - first;
  const int count = int(rest < w.windows_per_block ? rest : w.windows_per_block);
  const bool cosine = w.logit_scale != nullptr;

  clear_shared(shared, Layout::kBytes);
  __syncthreads();
  fill_places(w, place);
  for (int i = w.map.size + me.thread; i < kMaxTokens; i += blockDim.x)
    for (int stage = 0; stage < S::kStages; ++stage)
      reinterpret_cast<float*>(shared + Layout::kLse)[stage * 2 * kMaxTokens + i] = INFINITY;

  for (int member = 0; member < w.group; ++member) {
    const int head = kv_head * w.group + member;
    const uint32_t bias_hidden = load_bias<S>(w, head, bias, me);
    const bool bias_hides = __syncthreads_or(bias_hidden != 0);  // and the head before is done with shared memory
    if (me.thread == 0) cursors[0] = window_cursor(w.map, first);
    const float factor = score_factor(w, head), natural = cosine ? factor * kLn2 : w.scale;
    float dbias[S::kTiles][4], dtau = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) dbias[n][c] = 0.0f;

    // With two stages, turn -1 only starts the load of window 0, and every turn starts that of the next.
    for (int i = 1 - S::kStages; i < count; ++i) {
      const int turn = i & 1, stage = S::kStages == 2 ? turn : 0;
      const WindowCursor& cursor = cursors[turn];  // stays in shared memory: registers are scarce
      unsigned char *q = shared + stage * Layout::kStageBytes, *k = q + S::kMatrixBytes;
      unsigned char *v = k + S::kMatrixBytes, *dout = v + S::kMatrixBytes;
      const uint8_t* info = shared + Layout::kInfo + stage * kMaxTokens;
      if (S::kStages == 1) {
        __syncthreads();  // the window before has been read by all
        load_window<T, S>(p, head, cursor, stage, shared, me);
      }
      copy_wait_all();
      __syncthreads();  // this window is complete; the other stage, P and dS have been read by all
      if (cosine && i >= 0) {
        normalize_own_rows<T, S>(w, q, norm, me);
        normalize_own_rows<T, S>(w, k, norm + kMaxTokens, me);
        __syncthreads();
      }
      WindowCursor ahead = cursors[i < 0 ? 0 : turn];
      if (i >= 0) {
        next_window(w.map, &ahead);
        if (me.thread == 0) cursors[turn ^ 1] = ahead;
      }
      if (S::kStages == 2 && i + 1 < count) load_window<T, S>(p, head, ahead, stage ^ 1, shared, me);
      if (i < 0) continue;

      uint32_t hidden = bias_hidden, apart = 0;
      const bool special = window_is_special(w.map, cursor);
      if (special) {
        window_masks<S>(w, info, me, &hidden, &apart);
        if (w.mask_value == -INFINITY) {
          hidden |= apart;
          apart = 0;
        }
      }
      float s[S::kTiles][4], dp[S::kTiles][4];
      product_with_rows<T, S>(s, q, k, w.d, me);
      finish_scores<S>(s, factor, bias, hidden, apart, w.mask_value * kLog2E, me);
      product_with_rows<T, S>(dp, dout, v, w.dv, me);
      float probe = 0.0f;  // NaN where a value or a gradient is not finite
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n) probe += (dp[n][0] + dp[n][1] + dp[n][2] + dp[n][3]) * 0.0f;
      if (__any_sync(0xFFFFFFFFu, probe != 0.0f)) {
        drop_broken_outputs<T, S>(dout, transposed_row<S>(v, me), w.dv, hidden, me);
        product_with_rows<T, S, true>(dp, dout, v, w.dv, me);
      }
      const float* lse = reinterpret_cast<const float*>(shared + Layout::kLse) + stage * 2 * kMaxTokens;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float own = lse[fragment_row(me, 2 * half)];
        const float base = own == -INFINITY ? INFINITY : own * kLog2E;  // a row that sees no key: weights 0
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) s[n][c] = exp2_approx(s[n][c] - base);
      }
      // Elements that count: seen, and kept by dropout. What is hidden may be NaN: it is replaced, never multiplied.
      uint32_t counts = ~hidden;
      if (w.dropout_threshold != 0) {
        const uint32_t tokens[2] = {token_number(w, cursor, place[fragment_row(me, 0)]),
                                   token_number(w, cursor, place[fragment_row(me, 2)])};
        counts &= dropout_bits<S>(w, cursor.image, head, tokens, me);
      }
      if (counts != 0xFFFFFFFFu || w.dropout_threshold != 0) {
        const float kept = w.dropout_threshold != 0 ? w.dropout_scale : 1.0f;
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) dp[n][c] = counts >> (n * 4 + c) & 1 ? dp[n][c] * kept : 0.0f;
      }
      // P Z to shared memory, in T, for dv.
      unsigned char* own_weights = weights + fragment_row(me, 0) * Layout::kWeightRowBytes + me.t * 4;
      const float kept = w.dropout_threshold != 0 ? w.dropout_scale : 1.0f;
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t two = counts >> (n * 4 + half * 2);
          *reinterpret_cast<uint32_t*>(own_weights + n * 16 + half * 8 * Layout::kWeightRowBytes) =
              pack2<T>(two & 1 ? s[n][half * 2] * kept : 0.0f, two & 2 ? s[n][half * 2 + 1] * kept : 0.0f);
        }
      // dS = P (dP - sum_j P dP + dlse), in place of P.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float delta = 0.0f;
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
          delta += s[n][2 * half] * dp[n][2 * half] + s[n][2 * half + 1] * dp[n][2 * half + 1];
        delta += __shfl_xor_sync(0xFFFFFFFFu, delta, 1);
        delta += __shfl_xor_sync(0xFFFFFFFFu, delta, 2);
        delta -= lse[kMaxTokens + fragment_row(me, 2 * half)];
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) s[n][c] *= dp[n][c] - delta;
      }
      if (hidden != 0)
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (hidden >> (n * 4 + c) & 1) s[n][c] = 0.0f;
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) dbias[n][c] += s[n][c];
      if (p.dlogit_scale != nullptr) {
        product_with_rows<T, S>(dp, q, k, w.d, me);
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (s[n][c] != 0.0f) dtau += s[n][c] * dp[n][c];  // 0 where hidden, and q.k may be NaN there
      }
      unsigned char* own_ds = ds_matrix + (own_weights - weights);
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(own_ds + n * 16 + half * 8 * Layout::kWeightRowBytes) =
              pack2<T>(s[n][half * 2], s[n][half * 2 + 1]);
      __syncthreads();  // P and dS are complete; K and V have been read by all as scores
      if (bias_hides || (special && w.mask_value == -INFINITY)) {
        // dS = 0 times a hidden NaN key must not reach dq; where the key is seen dS is NaN itself.
        for (int i = me.thread; i < w.map.size * (S::kWidth / 2); i += blockDim.x) {
          uint32_t* word = reinterpret_cast<uint32_t*>(k + i / (S::kWidth / 2) * S::kRowBytes) + i % (S::kWidth / 2);
          *word = split_finite<T>(*word, true);
        }
        __syncthreads();
      }

      float acc[kWords][4];
      unsigned char* staged = v;  // V is no longer read; each warp uses its own rows
      const auto store = [&](const TokenView& target, int target_head, int width) {
        stage_rows<T, S>(acc, staged, me);
        __syncwarp();
        store_rows<S>(w, target, target_head, width, cursor, staged, place, me);
        __syncwarp();
      };
      const auto scale_rows = [&] {
#pragma unroll
        for (int n = 0; n < kWords; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[n][c] *= natural;
      };
      const unsigned char* ds_row =
          ds_matrix + (me.warp * 16 + (me.lane & 15)) * Layout::kWeightRowBytes + (me.lane >> 4) * 16;
      accumulate_rows<T, S>(acc, k, w.d, me,
                            [&](int step, uint32_t(&a)[4]) { load_matrix_x4(a, ds_row + step * 32); });
      scale_rows();
      if (cosine) undo_normalize<T, S>(acc, q, norm, me);
      store(p.dq, head, w.d);

      // The own 16 columns of P and dS as rows: key-major fragments.
      const int column_offset = ((me.lane & 7) + (me.lane >> 4) * 8) * Layout::kWeightRowBytes + me.warp * 32 +
                                ((me.lane >> 3) & 1) * 16;
      const auto key_gradient = [&](const unsigned char* matrix, const unsigned char* rows, int width, int which,
                                    const TokenView& target) {
        accumulate_rows<T, S>(acc, rows, width, me, [&](int step, uint32_t(&a)[4]) {
          load_matrix_x4_transposed(a, matrix + column_offset + step * 16 * Layout::kWeightRowBytes);
        });
        if (which == 0) {
          scale_rows();
          if (cosine) undo_normalize<T, S>(acc, k, norm + kMaxTokens, me);
        }
        if (special && w.pad_visible && (which == 0 ? p.dk_pad : p.dv_pad) != nullptr)
          add_pads<S>(acc, info, w.map.size, pad_sums + which * S::kWidth, me);
        bool complete = true;
        if (w.group > 1) {
          const BackwardRecord record = backward_record(w, S::kTiles);
          const int64_t tile = (((first + i) * kv_heads + kv_head) * 2 + which) * S::kThreads * kWords * 4;
          complete = add_group<S>(acc, w, member,
                                  p.workspace + p.runs * kv_heads * record.floats + record.dense_floats + tile);
        }
        if (complete) store(target, kv_head, width);
      };
      key_gradient(weights, dout, w.dv, 1, p.dv);
      key_gradient(ds_matrix, q, w.d, 0, p.dk);
    }

    const BackwardRecord record = backward_record(w, S::kTiles);
    float* partial = p.workspace + blockIdx.x * record.floats;
    float4* sums = reinterpret_cast<float4*>(partial + member * record.head_floats);
    if (p.dbias != nullptr)
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
        sums[n * blockDim.x + me.thread] = make_float4(dbias[n][0], dbias[n][1], dbias[n][2], dbias[n][3]);
    if (p.dlogit_scale != nullptr) {
#pragma unroll
      for (int bits = 1; bits < 32; bits *= 2) dtau += __shfl_xor_sync(0xFFFFFFFFu, dtau, bits);
      const bool clamped = w.logit_scale[head] > w.cosine_max;
      if (me.lane == 0) partial[member * record.head_floats + record.tau + me.warp] = clamped ? 0.0f : dtau * natural;
    }
  }
  __syncthreads();
  const BackwardRecord record = backward_record(w, S::kTiles);
  float* partial = p.workspace + blockIdx.x * record.floats;
  for (int i = me.thread; i < 2 * S::kWidth; i += blockDim.x) {
    float sum = 0.0f;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp)
      sum += reinterpret_cast<const float*>(shared + Layout::kPads)[warp * 2 * S::kWidth + i];
    if (i % S::kWidth < (i < S::kWidth ? w.d : w.dv))
      partial[record.pads + (i < S::kWidth ? i : w.d + i - S::kWidth)] = sum;
  }
}

}  // namespace

void window_attention_backward(WindowBackwardParams p, Element element, void* stream) {
  const auto run = [&](auto type, auto shape) {
    using T = decltype(type);
    using S = decltype(shape);
    p.runs = backward_runs(p.w.heads / p.w.group, p.w.windows, BackwardPlan<S>::kBlocks);
    p.w.windows_per_block = p.runs > 0 ? (p.w.windows + p.runs - 1) / p.runs : 0;
    launch("window_attention_backward", window_attention_backward_kernel<T, S>, p.runs * (p.w.heads / p.w.group),
           (p.w.map.size + 15) / 16 * 32, BackwardLayout<S>::kBytes, stream, p);
    reduce_partials(p, backward_record(p.w, S::kTiles), stream);
  };
  if (p.w.heads == 0) return;
  if (element == Element::bfloat16) with_tile<Bf16>(p.w, run);
  else with_tile<Half>(p.w, run);
}

int64_t window_attention_workspace(int64_t heads, int64_t kv_heads, int64_t windows, int64_t tokens, int64_t d,
                                   int64_t dv) {
  WindowParams w{};
  w.heads = int32_t(heads);
  w.group = int32_t(heads / kv_heads);
  w.map.size = int32_t(tokens);
  w.d = int32_t(d);
  w.dv = int32_t(dv);
  int64_t floats = 0;
  with_tile<Bf16>(w, [&](auto, auto shape) {
    using S = decltype(shape);
    const BackwardRecord record = backward_record(w, S::kTiles);
    floats = backward_runs(kv_heads, windows, BackwardPlan<S>::kBlocks) * kv_heads * record.floats +
             record.dense_floats;
    if (w.group > 1) floats += windows * kv_heads * 2 * S::kThreads * (S::kWidth / 8) * 4;
  });
  return floats;
}

}  // namespace vitkern
