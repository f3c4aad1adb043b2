// The host side of the CUDA kernels of token matching and merging: parameters and entry points. No torch, no CUDA.
#pragma once
#include <stdint.h>

#include "../common/tokens.h"

namespace vitkern {

enum class TokenType : int32_t { float32, bfloat16, float16 };
enum class PlanOrder : int32_t { split, score, position };
enum class TokenReduce : int32_t { mean, sum, max, first, mlerp };

constexpr int kPlanTokens = 16384;  // of a sample, in token_plan
constexpr int kMlerpWidth = 8192;   // a row in float32 stays in shared memory

// The best partner of every token. Strides in elements; the last dimension of the metric is contiguous.
struct MatchParams {
  const void* metric;  // [B, N, H, C]; the mean over H is matched
  TokenType type;
  int64_t batch_stride, token_stride, head_stride;
  int32_t batch, tokens, heads, width;
  const int8_t* role;  // [B or 1][N]; null: even positions are sources, odd ones destinations
  int64_t role_batch;
  int32_t protect;     // where role is null: the first tokens
  const int32_t* segments;  // [B or 1][N], or null
  int64_t segment_batch;
  MatchWindow window;
  int32_t cosine;
  float eps;
  float* score;      // [B][N]
  int32_t* dst;      // [B][N]
  int8_t* role_out;  // [B][N]
};

// Slots of tokens, and tokens of slots. r, threshold: [B] or null.
struct PlanParams {
  const float* score;   // [B][N]
  const int32_t* dst;   // [B][N]
  const int8_t* role;   // [B][N]
  const int32_t* r;
  const float* threshold;
  int32_t batch, tokens, most, slots;
  PlanOrder order;
  int32_t *token_map, *perm, *offsets, *lengths;  // [B][N], [B][N], [B][slots + 1], [B]
};

// A tensor [B, N, C] whose last dimension is contiguous; strides in elements.
struct TokenRows {
  void* data;
  int64_t batch, token;
};

// Rows named x belong to tokens, rows named y to slots. The backward reads x, weight, dy and dsize and writes dx and
// dweight; null where absent or not wanted.
struct MergeParams {
  TokenRows x, y, dy, dx;
  TokenType type;
  const float *weight, *dsize;  // [B][N], [B][slots]
  float *size, *dweight;        // [B][slots], [B][N]
  const int32_t *token_map, *perm, *offsets;
  int32_t batch, tokens, slots, width;
  int32_t vector;  // rows of x, y, dy and dx start on 16-byte boundaries and hold whole 16-byte words
  TokenReduce reduce;
  int32_t include_dst;
  float fill;      // what unmerging gives a token without a slot
};

void token_match(const MatchParams& p, void* stream);
void token_plan(const PlanParams& p, void* stream);
void token_merge(const MergeParams& p, void* stream);
void token_merge_backward(const MergeParams& p, void* stream);
// These two are what token_merge and its backward do for TokenReduce::mlerp.
void token_mlerp(const MergeParams& p, void* stream);
void token_mlerp_backward(const MergeParams& p, void* stream);
void token_unmerge(const MergeParams& p, void* stream);

}  // namespace vitkern
