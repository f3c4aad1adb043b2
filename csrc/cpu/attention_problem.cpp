// Reads the arguments of the op attention: second checks, strides, and the choice of the block of queries.
#include "attention_problem.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "attention";
constexpr int64_t kBlockBytes = 262144;  // of the scores of a block of queries

// A tensor that broadcasts to [B, H, Nq, Nk].
ScoreView score_view(const Tensor& t, const int64_t (&shape)[4], Dtype dtype) {
  check(t.dim() == 4, kOp, "score-shaped tensors must have 4 axes");
  int64_t stride[4];
  for (int a = 0; a < 4; ++a) {
    check(t.size(a) == 1 || t.size(a) == shape[a], kOp, "score-shaped tensors must broadcast to [B, H, Nq, Nk]");
    stride[a] = t.size(a) == 1 ? 0 : t.stride(a);
  }
  return {static_cast<const char*>(t.const_data_ptr()), dtype, stride[0], stride[1], stride[2], stride[3]};
}

// A tensor [B|1, N, H|1] or [B|1, N, H|1, W]: stride 0 on axes of length 1.
HeadsView token_view(const Tensor& t, int64_t batch, int64_t tokens, int64_t heads) {
  check((t.dim() == 3 || t.dim() == 4) && (t.size(0) == 1 || t.size(0) == batch) && t.size(1) == tokens &&
            (t.size(2) == 1 || t.size(2) == heads),
        kOp, "tensors of tokens must have shape [B or 1, N, H or 1]");
  HeadsView v = heads_view(t);
  if (t.size(0) == 1) v.rows.batch = 0;
  if (t.size(2) == 1) v.head = 0;
  return v;
}

std::vector<double> per_head(const Tensor& t, int64_t heads) {
  check(t.dim() == 1 && t.size(0) == heads, kOp, "scale, sink and slope must have shape [H]");
  std::vector<double> values;
  for (int64_t h = 0; h < heads; ++h) values.push_back(scalar<double>(t.const_data_ptr(), h * t.stride(0), dtype_of(t, kOp)));
  return values;
}

IdsView ids_view(const Tensor& t, int64_t batch, int64_t tokens) {
  check(t.scalar_type() == torch::headeronly::ScalarType::Int && t.dim() == 2 && (t.size(0) == 1 || t.size(0) == batch) &&
            t.size(1) == tokens,
        kOp, "ids must be int32 [B or 1, N]");
  return {static_cast<const int32_t*>(t.const_data_ptr()), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1)};
}
bool ids_below(const Tensor& t, int64_t limit) {
  const auto* data = static_cast<const int32_t*>(t.const_data_ptr());
  for (int64_t b = 0; b < t.size(0); ++b)
    for (int64_t i = 0; i < t.size(1); ++i)
      if (data[b * t.stride(0) + i * t.stride(1)] >= limit) return false;
  return true;
}

void shift(HeadsView& v, int64_t sample, int64_t token) {
  if (v.rows.data) v.rows.data += (sample * v.rows.batch + token * v.rows.token) * size_of(v.rows.dtype);
}
void shift(RowsView& v, int64_t sample, int64_t token) {
  if (v.data) v.data += (sample * v.batch + token * v.token) * size_of(v.dtype);
}
void shift(IdsView& v, int64_t sample, int64_t token) {
  if (v.data) v.data += sample * v.batch + token * v.token;
}

}  // namespace

HeadsView heads_view(const Tensor& t) {
  check(t.dim() == 3 || t.dim() == 4, kOp, "q, k and v must have shape [B, N, H, D]");
  return {{static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), t.stride(0), t.stride(1),
           t.dim() == 4 ? t.stride(3) : 1},
          t.stride(2)};
}

AttentionCall::AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o) {
  p.q = heads_view(q);
  p.k = heads_view(k);
  p.v = heads_view(v);
  const int64_t most = int64_t(1) << 30;
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(2) >= 1 &&
            q.size(2) % k.size(2) == 0 && v.size(2) == k.size(2) && v.size(1) == k.size(1) && k.size(3) == q.size(3) &&
            q.size(1) < most && k.size(1) < most && q.size(3) <= 256 && v.size(3) <= 256,
        kOp, "q, k and v do not fit together");
  batch = q.size(0);
  tokens_q_ = q.size(1);
  tokens_k_ = k.size(1);
  p.heads = int32_t(q.size(2));
  p.kv_heads = int32_t(k.size(2));
  p.depth = int32_t(q.size(3));
  p.width = int32_t(v.size(3));
  wide = p.q.rows.dtype == Dtype::f64;
  kernels = wide ? &vitkern::kernels().attention_f64 : &vitkern::kernels().attention_f32;
  read_sequences(o);
  const int32_t lanes = wide ? vitkern::kernels().lanes / 2 : vitkern::kernels().lanes;
  p.padded = (p.keys + lanes - 1) / lanes * lanes;
  // rows of a length that the sets of the cache divide would all fall into the same sets
  p.pitch = p.padded + (p.padded % 256 == 0 ? kKeyTile : 0);
  const char* const names[] = {"softmax", "sigmoid", "relu", "none", "argmax_k", "argmax_q"};  // in the order of Normalizer
  const auto* const named = std::find(std::begin(names), std::end(names), o.normalizer);
  check(named != std::end(names), kOp, "normalizer must be softmax, sigmoid, relu, none, argmax_k or argmax_q");
  p.normalizer = Normalizer(named - std::begin(names));
  factor_ = o.factor ? per_head(*o.factor, p.heads) : std::vector<double>(size_t(p.heads), o.scale);
  p.factor = factor_.data();
  if (o.sink) p.sink = (sink_ = per_head(*o.sink, p.heads)).data();
  p.causal = o.causal;
  p.offset = o.offset;
  p.topk = int32_t(std::min<int64_t>(o.topk, most));
  p.dropout_p = o.dropout_p;
  if (o.seed) {
    const auto* stream = static_cast<const int64_t*>(o.seed->const_data_ptr());
    const int64_t count = o.seed->numel();
    check(o.seed->scalar_type() == torch::headeronly::ScalarType::Long && o.seed->is_contiguous() &&
              (count == 1 || count == 2 || count == 2 + batch * tokens_q_),
          kOp, "seed must be int64 [1], [2] or [2 + B Nq] and contiguous");
    p.seed = uint64_t(stream[0]);
    if (count > 1) p.first_head = uint32_t(stream[1]);
    if (count == 2) first_image_ = uint32_t(uint64_t(stream[1]) >> 32);
    if (count > 2) p.places = stream + 2;
  }
  read_scores(o);
  read_positions(o);
  read_tables(o);
  read_contexts(o);
  read_ids(o);
  read_mixtures(o);
  choose_block();
}

void AttentionCall::read_sequences(const AttentionOptions& o) {
  packed = o.cu_q.has_value();
  if (!packed) {
    p.queries = int32_t(tokens_q_);
    p.keys = int32_t(tokens_k_);
    samples.assign(size_t(batch), {0, tokens_q_, 0, tokens_k_});
    return;
  }
  check(batch == 1 && o.cu_k && o.cu_q->dim() == 1 && o.cu_k->dim() == 1 && o.cu_q->size(0) == o.cu_k->size(0) &&
            o.cu_q->size(0) >= 1 && o.cu_q->scalar_type() == torch::headeronly::ScalarType::Int &&
            o.cu_k->scalar_type() == torch::headeronly::ScalarType::Int,
        kOp, "cu_seqlens_q and cu_seqlens_k must be int32 [S + 1]");
  const auto at = [](const Tensor& t, int64_t i) -> int64_t {
    return static_cast<const int32_t*>(t.const_data_ptr())[i * t.stride(0)];
  };
  const int64_t count = o.cu_q->size(0) - 1;
  bool fits = at(*o.cu_q, 0) == 0 && at(*o.cu_k, 0) == 0 && at(*o.cu_q, count) == tokens_q_ && at(*o.cu_k, count) == tokens_k_;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t q = at(*o.cu_q, s), k = at(*o.cu_k, s), nq = at(*o.cu_q, s + 1) - q, nk = at(*o.cu_k, s + 1) - k;
    fits = fits && nq >= 0 && nk >= 0 && nq <= o.max_q && nk <= o.max_k;
    samples.push_back({q, nq, k, nk});
  }
  check(fits, kOp,
        "cu_seqlens_q and cu_seqlens_k must ascend from 0 to the tokens of q and k, in steps of at most max_seqlen_q and max_seqlen_k");
  check(o.max_q < (int64_t(1) << 30) && o.max_k < (int64_t(1) << 30), kOp, "max_seqlen_q and max_seqlen_k must be below 2^30");
  p.queries = int32_t(o.max_q);
  p.keys = int32_t(o.max_k);
  if (o.bias || o.gain || o.weight || o.mask || o.early_gain || o.early_weight || o.position_index) return;  // whose shapes are of the greatest lengths
  p.queries = p.keys = 0;
  for (const Tokens& t : samples) {
    p.queries = std::max(p.queries, int32_t(t.queries));
    p.keys = std::max(p.keys, int32_t(t.keys));
  }
}

void AttentionCall::read_scores(const AttentionOptions& o) {
  const int64_t shape[4] = {batch, p.heads, p.queries, p.keys}, all[4] = {batch, p.heads, 1, tokens_k_};
  const struct {
    const OptTensor& from;
    ScoreView& to;
  } floats[] = {{o.bias, p.bias}, {o.gain, p.gain}, {o.weight, p.weight}, {o.early_gain, p.early_gain}, {o.early_weight, p.early_weight}};
  for (const auto& t : floats)
    if (t.from) t.to = score_view(*t.from, shape, dtype_of(*t.from, kOp));
  if (o.key_bias) p.key_bias = score_view(*o.key_bias, all, dtype_of(*o.key_bias, kOp));
  if (o.mask) {
    p.mask_bits = o.mask->scalar_type() == torch::headeronly::ScalarType::Int;
    check(p.mask_bits || o.mask->scalar_type() == torch::headeronly::ScalarType::Bool, kOp, "mask must be bool, or int32 words");
    const int64_t words[4] = {batch, p.heads, p.queries, (p.keys + 31) / 32};
    check(!p.mask_bits || (o.mask->dim() == 4 && o.mask->size(3) == words[3]), kOp, "mask must have a bit for every key");
    p.mask = score_view(*o.mask, p.mask_bits ? words : shape, Dtype::f32);
    for (int64_t* stride : {&p.mask.batch, &p.mask.head, &p.mask.row, &p.mask.column}) *stride *= p.mask_bits ? 4 : 1;
  }
}

void AttentionCall::read_positions(const AttentionOptions& o) {
  if (o.rel_y && o.rel_x && o.rel_y->dim() == 2) {
    read_axes(o);
  } else if (o.rel_y && o.rel_x) {
    p.rel_y = token_view(*o.rel_y, batch, tokens_q_, p.heads);
    p.rel_x = token_view(*o.rel_x, batch, tokens_q_, p.heads);
    p.rel_height = int32_t(o.rel_y->size(3));
    p.rel_width = int32_t(o.rel_x->size(3));
    check(int64_t(p.rel_height) * p.rel_width >= p.keys, kOp, "rel_y and rel_x must hold a map of all keys");
  }
  if (o.path_row && o.path_col) {
    p.path_row = token_view(*o.path_row, batch, tokens_k_, p.heads);
    p.path_col = token_view(*o.path_col, batch, tokens_k_, p.heads);
    p.path_width = int32_t(o.path_width);
    check(!packed && p.path_width > 0 && p.keys % p.path_width == 0 && p.queries == p.keys, kOp, "the path must be of a whole grid");
    p.path_height = p.keys / p.path_width;
    p.path_transposed = o.path_transposed;
  }
  if (o.slope) {
    check(o.q_xy && o.k_xy, kOp, "slope must go with coordinates");
    p.slope = (slope_ = per_head(*o.slope, p.heads)).data();
    const auto rows = [&](const Tensor& t, int64_t tokens) -> RowsView {
      check(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == batch) && t.size(1) == tokens && t.size(2) == 2, kOp,
            "coordinates must have shape [B or 1, N, 2]");
      return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), t.size(0) == 1 ? 0 : t.stride(0),
              t.stride(1), t.stride(2)};
    };
    p.q_xy = rows(*o.q_xy, tokens_q_);
    p.k_xy = rows(*o.k_xy, tokens_k_);
  }
  if (o.later_ratio) {
    check(o.later_ratio->numel() == 1, kOp, "the ratio of later keys must be one number");
    later_ratio_ = {scalar<double>(o.later_ratio->const_data_ptr(), 0, dtype_of(*o.later_ratio, kOp))};
    p.later_ratio = later_ratio_.data();
  }
  if (o.policy) {
    const Tensor& t = *o.policy;
    check(t.dim() == 2 && (t.size(0) == 1 || t.size(0) == batch) && t.size(1) == tokens_k_, kOp, "the policy must have shape [B or 1, Nk]");
    p.policy = {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), t.size(0) == 1 ? 0 : t.stride(0),
                t.stride(1), 1};
    p.policy_eps = o.policy_eps;
    p.policy_diagonal = o.policy_diagonal;
  }
  if (o.query_weight) p.query_weight = token_view(*o.query_weight, batch, tokens_q_, p.heads);
}

void AttentionCall::read_axes(const AttentionOptions& o) {
  check(!packed && o.grid_height > 0 && o.grid_width > 0 && o.grid_height * o.grid_width == p.queries &&
            p.queries == p.keys,
        kOp, "tables of decomposed positions must have a grid of all queries and keys");
  p.rel_height = int32_t(o.grid_height);
  p.rel_width = int32_t(o.grid_width);
  for (int a = 0; a < 2; ++a) {
    const Tensor& t = a == 0 ? *o.rel_y : *o.rel_x;
    check(t.dim() == 2 && t.size(0) == 2 * (a == 0 ? p.rel_height : p.rel_width) - 1 && t.size(1) == p.depth, kOp,
          "a table of decomposed positions must have shape [2 n - 1, D]");
    p.axis_table[a] = {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t, kOp), 0, t.stride(0), t.stride(1)};
    p.axis_rows[a] = int32_t(t.size(0));
  }
}

void AttentionCall::read_contexts(const AttentionOptions& o) {
  if (!o.position_index) return;
  const Tensor& index = *o.position_index;
  const Dtype acc = wide ? Dtype::f64 : Dtype::f32;
  check(index.dim() == 3 && (index.size(0) == 1 || index.size(0) == batch) && index.size(1) == p.queries && index.size(2) == p.keys &&
            index.scalar_type() == torch::headeronly::ScalarType::Int,
        kOp, "position_index must be int32 [B or 1, Nq, Nk]");
  p.positions = {static_cast<const int32_t*>(index.const_data_ptr()), index.size(0) == 1 ? 0 : index.stride(0), index.stride(1), index.stride(2)};
  const auto of = [&](const Tensor& t, int64_t tokens) {
    check(t.dim() == 4 && t.size(0) == batch && t.size(1) == tokens && t.size(2) == p.heads && dtype_of(t, kOp) == acc, kOp,
          "position_q and position_k must have shape [B, N, H, n], in the dtype of lse");
    p.position_count = int32_t(t.size(3));
    return heads_view(t);
  };
  if (o.position_q) p.position_q = of(*o.position_q, tokens_q_);
  if (o.position_k) p.position_k = of(*o.position_k, tokens_k_);
  if (o.position_v) {
    const Tensor& t = *o.position_v;
    check(t.dim() == 4 && t.size(0) == 1 && (t.size(1) == 1 || t.size(1) == p.heads) && t.size(3) == p.width, kOp,
          "position_v must have shape [1, H or 1, n, Dv]");
    p.position_count = int32_t(t.size(2));
    p.position_v = {static_cast<const char*>(t.const_data_ptr()), dtype_of(t, kOp), 0, t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), t.stride(3)};
  }
  bool inside = (!o.position_q || o.position_q->size(3) == p.position_count) && (!o.position_k || o.position_k->size(3) == p.position_count);
  for (int64_t b = 0; b < index.size(0); ++b)
    for (int64_t i = 0; i < p.queries; ++i) {
      const int32_t* row = p.positions.data + b * p.positions.batch + i * p.positions.row;
      for (int64_t j = 0; j < p.keys; ++j) inside &= uint32_t(row[j * p.positions.column]) < uint32_t(p.position_count);
    }
  check(inside, kOp, "position_index must lie in [0, n), the rows of all tables");
}

void AttentionCall::read_tables(const AttentionOptions& o) {
  const OptTensor* const tables[kTables] = {&o.bias_table, &o.gain_table, &o.weight_table};  // in the order of Table
  const int64_t most = int64_t(1) << 15, height = o.grid_height, width = o.grid_width, step = o.grid_step;
  for (int i = 0; i < kTables; ++i) {
    if (!*tables[i]) continue;
    const Tensor& t = **tables[i];
    check(height > 0 && height < most && width > 0 && width < most && step > 0 && o.grid_prefix >= 0 && o.grid_prefix < most &&
              o.grid_prefix + height * width >= p.keys &&
              o.grid_prefix + ((height + step - 1) / step) * ((width + step - 1) / step) >= p.queries,
          kOp, "the grid of a table must hold all queries and keys");
    p.grid_height = int32_t(height);
    p.grid_width = int32_t(width);
    p.grid_prefix = int32_t(o.grid_prefix);
    p.grid_step = int32_t(std::min(step, most));
    p.grid_columns = int32_t((width + step - 1) / step);
    check(t.dim() == 4 && t.size(0) == 1 && (t.size(1) == 1 || t.size(1) == p.heads) && t.size(2) == 1 && t.size(3) == table_entries(p), kOp,
          "a table must have shape [1, H or 1, 1, entries]");
    p.tables[i] = {static_cast<const char*>(t.const_data_ptr()), dtype_of(t, kOp), 0, t.size(1) == 1 ? 0 : t.stride(1), 0, t.stride(3)};
  }
}

void AttentionCall::read_ids(const AttentionOptions& o) {
  p.rule = o.rule == "equal" ? Rule::equal : o.rule == "table" ? Rule::table : o.rule == "upto" ? Rule::upto : Rule::none;
  if (p.rule == Rule::none) return;
  check(o.q_ids && o.k_ids, kOp, "a rule must go with ids");
  p.q_ids = ids_view(*o.q_ids, batch, tokens_q_);
  p.k_ids = ids_view(*o.k_ids, batch, tokens_k_);
  if (p.rule != Rule::table) return;
  check(o.allow && o.allow->dim() == 2 && o.allow->scalar_type() == torch::headeronly::ScalarType::Bool, kOp, "allow must be a bool table");
  check(ids_below(*o.q_ids, o.allow->size(0)) && ids_below(*o.k_ids, o.allow->size(1)), kOp,
        "mask Segments: ids must be below the sides of allow");
  p.allow = static_cast<const uint8_t*>(o.allow->const_data_ptr());
  p.allow_row = o.allow->stride(0);
  p.allow_column = o.allow->stride(1);
  p.allow_columns = int32_t(o.allow->size(1));
}

void AttentionCall::read_mixtures(const AttentionOptions& o) {
  const struct {
    const OptTensor& from;
    const double*& to;
  } parts[] = {{o.pre_weight, p.pre_weight}, {o.pre_bias, p.pre_bias}, {o.post_weight, p.post_weight}, {o.post_bias, p.post_bias}};
  for (int i = 0; i < 4; ++i) {
    if (!parts[i].from) continue;
    const Tensor& t = *parts[i].from;
    check(t.dim() == (i % 2 ? 1 : 2) && t.size(0) == p.heads && t.size(t.dim() - 1) == p.heads && p.heads <= 128, kOp,
          "mixtures must have shape [H, H] and [H], of at most 128 heads");
    for (int64_t g = 0; g < p.heads; ++g)
      for (int64_t h = 0; h < (i % 2 ? 1 : p.heads); ++h)
        mixtures_[i].push_back(scalar<double>(t.const_data_ptr(), g * t.stride(0) + (i % 2 ? 0 : h * t.stride(1)), dtype_of(t, kOp)));
    parts[i].to = mixtures_[i].data();
  }
  check(mixes(p) || !(o.early_gain || o.early_weight), kOp, "early factors must go with mixtures");
  units = mixes(p) ? 1 : p.kv_heads;
}

// A block holds what the cache does, 8 to 64 rows. Where a mask shows each query other keys, and few, a block is scattered: what it
// sees together would be most of the keys. Judged by some of the rows. Of its scores few are touched, so that it may be larger.
void AttentionCall::choose_block() {
  const int64_t row = int64_t(std::max(p.padded, 1)) * (wide ? 8 : 4), tiles = p.keys / kKeyTile;
  p.block = int32_t(std::clamp<int64_t>(kBlockBytes / row, 8, 64));
  if (mixes(p)) p.block = int32_t(std::clamp<int64_t>(kBlockBytes / (row * p.heads), 4, 64));
  if (mixes(p) || is_hard(p) || p.position_v.data) return;
  if (!has_tiles(p) || !p.mask.row || p.queries < 16 || tiles < 16 || !batch) return;
  int64_t alone = 0, together = 0;
  for (int64_t part = 0; part < 4; ++part) {
    std::vector<bool> some(static_cast<size_t>(tiles));
    const int64_t first = (p.queries - 16) * part / 4;
    for (int64_t i = first; i < first + 16; ++i) {
      const char* seen = p.mask.data + (batch - 1) * p.mask.batch + i * p.mask.row;
      for (int64_t t = 0; t < tiles; ++t) {
        if (!shows_tile(p, seen, int32_t(t * kKeyTile))) continue;
        ++alone;
        some[size_t(t)] = true;
      }
    }
    together += 16 * std::count(some.begin(), some.end(), true);
  }
  p.scattered = 3 * alone < together;
  if (p.scattered) p.block = int32_t(std::clamp<int64_t>(8 * kBlockBytes / row, 8, 128));
}

AttentionProblem AttentionCall::sample(int64_t s) const {
  AttentionProblem one = p;
  const Tokens& t = samples[size_t(s)];
  const int64_t b = packed ? 0 : s;
  const int32_t lanes = wide ? vitkern::kernels().lanes / 2 : vitkern::kernels().lanes;
  one.queries = int32_t(t.queries);
  one.keys = int32_t(t.keys);
  one.padded = (one.keys + lanes - 1) / lanes * lanes;
  one.sample = first_image_ + uint32_t(s);
  for (HeadsView* v : {&one.q, &one.out, &one.lse, &one.dout, &one.dlse, &one.dq, &one.rel_y, &one.rel_x, &one.query_weight, &one.position_q})
    shift(*v, b, t.first_query);
  for (HeadsView* v : {&one.k, &one.v, &one.dk, &one.dv, &one.path_row, &one.path_col, &one.dkey_mean, &one.position_k}) shift(*v, b, t.first_key);
  shift(one.q_xy, b, t.first_query);
  shift(one.k_xy, b, t.first_key);
  shift(one.policy, b, t.first_key);
  shift(one.q_ids, b, t.first_query);
  shift(one.k_ids, b, t.first_key);
  for (ScoreView* v : {&one.bias, &one.gain, &one.weight, &one.early_gain, &one.early_weight})
    if (v->data) v->data += b * v->batch * size_of(v->dtype);
  if (one.key_bias.data) one.key_bias.data += (b * one.key_bias.batch + t.first_key * one.key_bias.column) * size_of(one.key_bias.dtype);
  if (one.positions.data) one.positions.data += b * one.positions.batch;
  if (one.mask.data) one.mask.data += b * one.mask.batch;
  return one;
}

}  // namespace vitkern
