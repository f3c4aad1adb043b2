// The gradients of attention on the CPU: a task is the samples and heads of one chunk, all their queries.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "attention_problem.h"
#include "attention_tasks.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "attention";

// The sums that one score-shaped tensor takes from all samples and heads that share it: as many copies as there are chunks.
template <typename Acc>
struct SharedSums {
  int64_t sizes[4] = {1, 1, 1, 1}, row = 0, total = 0, copies = 1;
  bool wanted = false, map = false;
  Dtype dtype = Dtype::f32;
  std::vector<Acc> data;
  OptTensor direct;  // the gradient itself, of a map whose entries come but once

  void measure(const OptTensor& t, bool needed, int64_t columns, bool of_pairs = false) {
    if (!(wanted = needed && t)) return;
    map = of_pairs;
    dtype = dtype_of(*t, kOp);
    for (int a = 0; a < 4; ++a) sizes[a] = t->size(a);
    row = sizes[3] == 1 ? 1 : columns;
    total = sizes[0] * sizes[1] * sizes[2] * row;
  }
  ScoreSums at(int64_t chunk, int64_t batch) {
    if (!wanted || total == 0) return {};
    if (direct) {
      char* to = static_cast<char*>(direct->mutable_data_ptr()) + batch * sizes[1] * sizes[2] * sizes[3] * size_of(dtype);
      return {to, sizes[2] * sizes[3], sizes[3], true, true, dtype};
    }
    Acc* base = data.data() + (chunk % copies) * total + (sizes[0] == 1 ? 0 : batch * sizes[1] * sizes[2] * row);
    return {base, sizes[1] == 1 ? 0 : sizes[2] * row, sizes[2] == 1 ? 0 : row, sizes[3] != 1, false, Dtype::f32};
  }
  OptTensor gradient() const {
    if (!wanted || direct) return direct;
    Tensor grad = new_tensor({sizes[0], sizes[1], sizes[2], sizes[3]}, dtype);
    const int64_t rows = sizes[0] * sizes[1] * sizes[2], columns = sizes[3];
    with_element(dtype, [&](auto element) {
      using T = decltype(element);
      T* to = static_cast<T*>(grad.mutable_data_ptr());
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1)), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
          for (int64_t j = 0; j < columns; ++j) {
            Acc sum = data[size_t(r * row + j)];
            for (int64_t c = 1; c < copies; ++c) sum += data[size_t(c * total + r * row + j)];
            to[r * columns + j] = narrowed<T>(sum);
          }
      });
    });
    return grad;
  }
};

// Samples and heads that add to one place are a family; it is cut into chunks, each with sums of its own, which are added in
// order: fixed by the problem, not by the threads.
template <typename Acc>
struct Families {
  int64_t all, kv_heads, samples, heads, chunks = 1;
  bool shared = false;  // whether there are such sums at all

  Families(const AttentionCall& c, std::initializer_list<SharedSums<Acc>*> sums)
      : all(int64_t(c.samples.size())), kv_heads(c.units), samples(all), heads(kv_heads) {
    int64_t bytes = 1;
    for (const SharedSums<Acc>* s : sums) {
      if (!s->wanted) continue;
      shared = true;
      if (s->sizes[0] == 1) samples = 1;
      if (s->sizes[1] == 1) heads = 1;
      bytes = std::max<int64_t>(bytes, s->total * int64_t(sizeof(Acc)));
    }
    const int64_t fit = (int64_t(64) << 20) / bytes;
    if (samples * heads > 0) chunks = std::clamp<int64_t>(std::min(16 / (samples * heads), fit), 1, std::max<int64_t>(members(), 1));
    for (SharedSums<Acc>* s : sums) {
      if (!s->wanted) continue;
      const bool whole = s->sizes[0] == all && s->sizes[1] == c.p.heads && s->sizes[2] == c.p.queries && s->sizes[3] == c.p.keys;
      if (s->map && whole && members() == 1 && !c.packed) {
        s->direct = new_tensor({s->sizes[0], s->sizes[1], s->sizes[2], s->sizes[3]}, s->dtype);
        continue;
      }
      if (s->sizes[0] == 1 || s->sizes[1] == 1) s->copies = chunks;
      s->data.assign(size_t(s->total * s->copies), Acc(0));
    }
  }
  int64_t members() const { return samples * heads > 0 ? all * kv_heads / (samples * heads) : 0; }
  // The member-th (sample, kv head) of a family.
  std::pair<int64_t, int32_t> unit(int64_t family, int64_t member) const {
    const int64_t inner = kv_heads / heads;
    const int64_t sample = samples == 1 ? member / inner : family / heads;
    return {sample, int32_t(heads == 1 ? member % inner : family % heads)};
  }
};

// Acc [all tokens][H][width] from the kernel; `gradient` has the axes of the argument, [B|1, N, H|1, W] in some order.
template <typename Acc>
struct TokenSums {
  std::vector<Acc> data;
  int64_t width = 1;

  void make(bool wanted, int64_t tokens, int64_t heads, int64_t each) {
    width = each;
    if (wanted) data.assign(size_t(tokens * heads * each), Acc(0));
  }
  void* at(int64_t token, int64_t heads) { return data.empty() ? nullptr : data.data() + token * heads * width; }

  // The sum over what `like` has once; its axes batch, tokens, heads and width, -1 for one that it lacks.
  OptTensor gradient(bool wanted, const OptTensor& like, const AttentionCall& c, int64_t tokens, const int (&axes)[4]) const {
    if (!wanted) return std::nullopt;
    const std::vector<int64_t> sizes(like->sizes().begin(), like->sizes().end());
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t a = sizes.size() - 1; a-- > 0;) strides[a] = strides[a + 1] * sizes[a + 1];
    const auto step = [&](int axis) { return axis < 0 || sizes[size_t(axis)] == 1 ? 0 : strides[size_t(axis)]; };
    const Dtype dtype = dtype_of(*like, kOp);
    Tensor grad = new_tensor(sizes, dtype);
    std::vector<Acc> sums(size_t(grad.numel()), Acc(0));
    const Acc* from = data.data();
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t n = 0; n < tokens; ++n)
        for (int64_t h = 0; h < c.p.heads; ++h)
          for (int64_t i = 0; i < width; ++i)
            sums[size_t(b * step(axes[0]) + n * step(axes[1]) + h * step(axes[2]) + i * step(axes[3]))] += *from++;
    void* to = grad.mutable_data_ptr();
    for (size_t i = 0; i < sums.size(); ++i) set_scalar<Acc>(to, int64_t(i), dtype, sums[i]);
    return grad;
  }
};

// Values of every sample, summed: [], [H] or [H, H], as `like`.
OptTensor head_sums(bool wanted, const std::vector<double>& each, const OptTensor& like) {
  if (!wanted) return std::nullopt;
  const Dtype dtype = dtype_of(*like, kOp);
  Tensor grad = new_tensor({like->sizes().begin(), like->sizes().end()}, dtype);
  const size_t count = size_t(grad.numel());
  for (size_t h = 0; h < count; ++h) {
    double sum = 0;
    for (size_t i = h; i < each.size(); i += count) sum += each[i];
    set_scalar<double>(grad.mutable_data_ptr(), int64_t(h), dtype, sum);
  }
  return grad;
}

using Gradients = std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor,
                             OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor,
                             OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor,
                             OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor>;

// The sum of what every sample and head left, [rows, depth] each.
template <typename Acc>
OptTensor table_sum(bool wanted, const std::vector<Acc>& each, const OptTensor& like) {
  if (!wanted) return std::nullopt;
  const Dtype dtype = dtype_of(*like, kOp);
  Tensor grad = new_tensor({like->sizes().begin(), like->sizes().end()}, dtype);
  std::vector<double> sums(size_t(grad.numel()), 0.0);
  for (size_t i = 0; i < each.size();)
    for (double& sum : sums) sum += double(each[i++]);
  for (size_t i = 0; i < sums.size(); ++i) set_scalar<double>(grad.mutable_data_ptr(), int64_t(i), dtype, sums[i]);
  return grad;
}

// The bits of `need`.
enum Wanted { kQ, kK, kV, kBias, kKeyBias, kFactor, kSink, kGain, kWeight, kRelY, kRelX, kPathRow, kPathCol, kSlope, kQxy, kKxy, kQueryWeight, kPreWeight,
              kPreBias, kPostWeight, kPostBias, kPolicy, kTable,
              kLaterRatio = kTable + kTables, kPositionQ, kPositionK, kPositionV, kEarlyGain, kEarlyWeight };

template <typename Acc>
Gradients backward(AttentionCall& c, const AttentionOptions& o, int64_t tokens_q, int64_t tokens_k, int64_t need) {
  AttentionProblem& p = c.p;
  Tensor dq = new_tensor({c.batch, tokens_q, p.heads, p.depth}, p.q.rows.dtype);
  Tensor dk = new_tensor({c.batch, tokens_k, p.kv_heads, p.depth}, p.k.rows.dtype);
  Tensor dv = new_tensor({c.batch, tokens_k, p.kv_heads, p.width}, p.v.rows.dtype);
  p.dq = heads_view(dq);
  p.dk = heads_view(dk);
  p.dv = heads_view(dv);
  const auto wants = [&](Wanted bit, const OptTensor& t) { return bool(need >> bit & 1) && t.has_value(); };
  p.learns_factor = wants(kFactor, o.factor);
  SharedSums<Acc> bias, gain, weight;
  bias.measure(o.bias, wants(kBias, o.bias), p.padded, true);
  gain.measure(o.gain, wants(kGain, o.gain), p.padded, true);
  weight.measure(o.weight, wants(kWeight, o.weight), p.padded, true);
  const OptTensor* const given_tables[kTables] = {&o.bias_table, &o.gain_table, &o.weight_table};  // in the order of Table
  SharedSums<Acc> tables[kTables], position_v, early_gain, early_weight;
  for (int t = 0; t < kTables; ++t) tables[t].measure(*given_tables[t], wants(Wanted(kTable + t), *given_tables[t]), table_entries(p));
  position_v.measure(o.position_v, wants(kPositionV, o.position_v), p.width);
  early_gain.measure(o.early_gain, wants(kEarlyGain, o.early_gain), p.padded, true);
  early_weight.measure(o.early_weight, wants(kEarlyWeight, o.early_weight), p.padded, true);
  const Families<Acc> families(c, {&bias, &gain, &weight, &tables[0], &tables[1], &tables[2], &position_v, &early_gain, &early_weight});
  TokenSums<Acc> keys, rel_y, rel_x, path_row, path_col, q_xy, k_xy, of_queries, policy, position_q, position_k;
  keys.make(wants(kKeyBias, o.key_bias), c.all_keys(), p.heads, 1);
  rel_y.make(wants(kRelY, o.rel_y) && !has_axes(p), c.all_queries(), p.heads, p.rel_height);
  rel_x.make(wants(kRelX, o.rel_x) && !has_axes(p), c.all_queries(), p.heads, p.rel_width);
  path_row.make(wants(kPathRow, o.path_row), c.all_keys(), p.heads, 1);
  path_col.make(wants(kPathCol, o.path_col), c.all_keys(), p.heads, 1);
  q_xy.make(wants(kQxy, o.q_xy), c.all_queries(), p.heads, 2);
  k_xy.make(wants(kKxy, o.k_xy), c.all_keys(), p.heads, 2);
  of_queries.make(wants(kQueryWeight, o.query_weight), c.all_queries(), p.heads, 1);
  policy.make(wants(kPolicy, o.policy), c.all_keys(), p.heads, 1);
  position_q.make(wants(kPositionQ, o.position_q), c.all_queries(), p.heads, p.position_count);
  position_k.make(wants(kPositionK, o.position_k), c.all_keys(), p.heads, p.position_count);
  const size_t places = c.samples.size() * size_t(p.heads);
  std::vector<double> factor(wants(kFactor, o.factor) ? places : 0), sink(wants(kSink, o.sink) ? places : 0);
  std::vector<double> slope(wants(kSlope, o.slope) ? places : 0), later(wants(kLaterRatio, o.later_ratio) ? places : 0);
  std::vector<Acc> axes[2];
  const bool axis_wanted[2] = {has_axes(p) && wants(kRelY, o.rel_y), has_axes(p) && wants(kRelX, o.rel_x)};
  const int64_t axis_size[2] = {int64_t(p.axis_rows[0]) * p.depth, int64_t(p.axis_rows[1]) * p.depth};
  for (int a = 0; a < 2; ++a)
    if (axis_wanted[a]) axes[a].resize(places * size_t(axis_size[a]));
  const struct {
    Wanted bit;
    const OptTensor& like;
  } mixtures[] = {{kPreWeight, o.pre_weight}, {kPreBias, o.pre_bias}, {kPostWeight, o.post_weight}, {kPostBias, o.post_bias}};
  std::vector<double> mixed[4];
  for (int i = 0; i < 4; ++i)
    if (wants(mixtures[i].bit, mixtures[i].like)) mixed[i].resize(c.samples.size() * size_t(mixtures[i].like->numel()));
  const auto one = [&](int64_t s, int32_t head, int64_t chunk, void* scratch) {
    const AttentionProblem sample = c.sample(s);
    const Tokens& t = c.samples[size_t(s)];
    const int64_t b = c.packed ? 0 : s, first_q = b * tokens_q + t.first_query, first_k = b * tokens_k + t.first_key;
    const auto of = [&](std::vector<double>& each) { return each.empty() ? nullptr : each.data() + s * int64_t(each.size() / c.samples.size()); };
    const auto axis = [&](int a) { return axes[a].empty() ? nullptr : axes[a].data() + s * p.heads * axis_size[a]; };
    const AttentionSums sums{bias.at(chunk, b), gain.at(chunk, b), weight.at(chunk, b),
                             {tables[0].at(chunk, b), tables[1].at(chunk, b), tables[2].at(chunk, b)}, position_v.at(chunk, b), early_gain.at(chunk, b), early_weight.at(chunk, b), keys.at(first_k, p.heads),
                             rel_y.at(first_q, p.heads), rel_x.at(first_q, p.heads), path_row.at(first_k, p.heads),
                             path_col.at(first_k, p.heads), q_xy.at(first_q, p.heads), k_xy.at(first_k, p.heads),
                             of_queries.at(first_q, p.heads), policy.at(first_k, p.heads),
                             position_q.at(first_q, p.heads), position_k.at(first_k, p.heads), {axis(0), axis(1)}, of(factor), of(sink), of(slope), of(later), of(mixed[0]), of(mixed[1]),
                             of(mixed[2]), of(mixed[3])};
    c.kernels->backward(sample, head, sums, scratch);
  };
  if (families.shared) {
    const int64_t count = families.samples * families.heads, members = families.members(), chunks = families.chunks;
    const int64_t bytes = c.kernels->scratch_bytes(p, true);
    torch::stable::parallel_for(0, count * chunks, 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes);
      for (int64_t t = first; t < last; ++t)
        for (int64_t m = members * (t % chunks) / chunks; m < members * (t % chunks + 1) / chunks; ++m) {
          const auto [s, head] = families.unit(t / chunks, m);
          one(s, head, t % chunks, scratch.data());
        }
    });
  } else {
    over_tasks(c, attention_tasks(c, false), true, [&](const AttentionTask& t, int64_t, void* scratch) { one(t.sample, t.kv_head, 0, scratch); });
  }
  const auto given = [need](Wanted bit, const Tensor& t) { return need >> bit & 1 ? OptTensor(t) : OptTensor(); };
  const auto mixture = [&](int i) { return head_sums(wants(mixtures[i].bit, mixtures[i].like), mixed[i], mixtures[i].like); };
  const int tokens[4] = {0, 1, 2, 3}, vectors[4] = {0, 3, 1, -1}, flat[4] = {0, 1, 2, -1}, places_of[4] = {0, 1, -1, 2}, keys_of[4] = {0, 1, -1, -1};
  return {given(kQ, dq), given(kK, dk), given(kV, dv), bias.gradient(),
          keys.gradient(wants(kKeyBias, o.key_bias), o.key_bias, c, tokens_k, vectors),
          head_sums(wants(kFactor, o.factor), factor, o.factor), head_sums(wants(kSink, o.sink), sink, o.sink),
          gain.gradient(), weight.gradient(),
          has_axes(p) ? table_sum(axis_wanted[0], axes[0], o.rel_y) : rel_y.gradient(wants(kRelY, o.rel_y), o.rel_y, c, tokens_q, tokens),
          has_axes(p) ? table_sum(axis_wanted[1], axes[1], o.rel_x) : rel_x.gradient(wants(kRelX, o.rel_x), o.rel_x, c, tokens_q, tokens),
          path_row.gradient(wants(kPathRow, o.path_row), o.path_row, c, tokens_k, flat),
          path_col.gradient(wants(kPathCol, o.path_col), o.path_col, c, tokens_k, flat),
          head_sums(wants(kSlope, o.slope), slope, o.slope),
          q_xy.gradient(wants(kQxy, o.q_xy), o.q_xy, c, tokens_q, places_of),
          k_xy.gradient(wants(kKxy, o.k_xy), o.k_xy, c, tokens_k, places_of),
          of_queries.gradient(wants(kQueryWeight, o.query_weight), o.query_weight, c, tokens_q, flat),
          mixture(0), mixture(1), mixture(2), mixture(3),
          policy.gradient(wants(kPolicy, o.policy), o.policy, c, tokens_k, keys_of),
          tables[0].gradient(), tables[1].gradient(), tables[2].gradient(),
          head_sums(wants(kLaterRatio, o.later_ratio), later, o.later_ratio),
          position_q.gradient(wants(kPositionQ, o.position_q), o.position_q, c, tokens_q, tokens),
          position_k.gradient(wants(kPositionK, o.position_k), o.position_k, c, tokens_k, tokens), position_v.gradient(),
          early_gain.gradient(), early_weight.gradient()};
}

Gradients attention_bwd(OptTensor dout, OptTensor dlse, OptTensor dkey_mean, Tensor /*lse*/, Tensor /*key_mean*/,
                        VITKERN_ATTENTION_ARGUMENTS, int64_t need) {
  const AttentionOptions o VITKERN_ATTENTION_OPTIONS;
  AttentionCall c(q, k, v, o);
  if (dout) {
    check(dout->dim() == 4 && dout->size(1) == q.size(1) && dout->size(3) == v.size(3), kOp, "the gradient must be of out's shape");
    c.p.dout = heads_view(*dout);
  }
  if (dlse && c.p.normalizer == Normalizer::softmax) c.p.dlse = heads_view(*dlse);
  if (dkey_mean && query_weight) c.p.dkey_mean = heads_view(*dkey_mean);
  return c.wide ? backward<double>(c, o, q.size(1), k.size(1), need) : backward<float>(c, o, q.size(1), k.size(1), need);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd)); }

}  // namespace vitkern
