// linear_attention on the CPU: sums of the keys in parts of each sequence, the parts added in order, then the queries.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "linear_attention_call.h"

namespace vitkern {

namespace {

#define VITKERN_LINEAR_ARGUMENTS                                                                                                     \
  Tensor q, Tensor k, Tensor v, OptTensor key_mask, OptTensor key_weight, OptTensor cos_q, OptTensor sin_q, OptTensor cos_k,          \
      OptTensor sin_k, OptTensor cu_q, OptTensor cu_k, OptTensor map0, OptTensor map1, OptTensor map2, std::string feature_map,       \
      double rate, std::string normalizer, double eps, double scale, double offset, bool half, bool detach, bool by_pairs,                 \
      std::string /*gpu*/
#define VITKERN_LINEAR_OPTIONS                                                                                                      \
  {q,    k,    v,           key_mask, key_weight, cos_q, sin_q, cos_k,  sin_k, cu_q,  cu_k,                                           \
   map0, map1, map2,        feature_map, rate,    normalizer, eps, scale, offset, half, detach}

template <typename Acc>
struct Run {
  LinearCall& c;
  const LinearProblem& p;
  LinearPacks<Acc> packs;
  int64_t of_states, of_kept, of_across, of_sums;  // of one sequence; of one slot of the gradients of the parameters
  std::vector<Acc> kept, states, sums;

  Run(LinearCall& call, const LinearArguments& a)
      : c(call), p(call.p), packs(call.p, a.map0, a.map1, a.map2, call.kernels->padded) {
    of_states = p.kv_heads * p.state_size;
    of_kept = p.kv_heads * p.kept_size;
    of_across = int64_t(p.kv_heads) * p.width * p.depth_pad;
    of_sums = p.map.heads * (p.map.rows_size + p.map.second_size + p.map.third_size);
    if (p.pairs) check(2 * p.pairs <= p.depth, kOp, "rope turns at most all features");
  }
  const Acc* kept_of(const LinearSequence& s) const { return kept.data() + s.number * of_kept; }

  // What the map rests on of all tokens, for every sequence.
  void keep() {
    kept.assign(size_t(p.sequences * of_kept), Acc(0));
    if (p.feature == Feature::softmax) normalize_keys();
    if (p.feature == Feature::favor || p.feature == Feature::hash) map_sums(true);
    if (p.feature == Feature::hash) map_sums(false);
  }
  void map_sums(bool of_keys) {
    const std::vector<int64_t>& parts = of_keys ? c.k_parts : c.q_parts;
    const int64_t heads = of_keys ? p.kv_heads : p.heads;
    std::vector<Acc> found(size_t(parts.back() * heads * 2));
    c.over(parts, of_keys, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, void* scratch) {
      c.kernels->map_sums(p, s, first, last, of_keys, found.data() + i * heads * 2, scratch);
    });
    for (int64_t s = 0; s < p.sequences; ++s)
      for (int64_t h = 0; h < heads; ++h) {
        Acc value = 0, count = 0;
        for (int64_t i = parts[size_t(s)]; i < parts[size_t(s) + 1]; ++i) {
          const Acc* one = found.data() + (i * heads + h) * 2;
          if (p.feature == Feature::hash) value += one[0];
          else if (one[1] > 0) value = count > 0 ? std::max(value, one[0]) : one[0];
          count += one[1];
        }
        if (p.feature == Feature::hash) kept[size_t(s * of_kept + 2 * h + of_keys)] = value / (std::max(count, Acc(1)) * Acc(p.map.middle));
        else kept[size_t(s * of_kept + h)] = std::isinf(value) ? Acc(0) : value;
      }
  }
  // lse from the largest and the sums of the parts
  void normalize_keys() {
    const int64_t parts = c.k_parts.back(), of_lse = of_kept;
    std::vector<Acc> largest(size_t(parts * of_lse)), sum(size_t(parts * of_lse));
    c.over(c.k_parts, true, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, void* scratch) {
      Acc* top = largest.data() + i * of_lse;
      std::fill(top, top + of_lse, -std::numeric_limits<Acc>::infinity());
      c.kernels->key_sums(p, s, first, last, top, sum.data() + i * of_lse, scratch);
    });
    for (int64_t s = 0; s < p.sequences; ++s)
      for (int64_t d = 0; d < of_lse; ++d) {
        if (d % p.depth_pad >= p.depth) continue;
        Acc top = -std::numeric_limits<Acc>::infinity(), total = 0;
        for (int64_t i = c.k_parts[size_t(s)]; i < c.k_parts[size_t(s) + 1]; ++i) top = std::max(top, largest[size_t(i * of_lse + d)]);
        for (int64_t i = c.k_parts[size_t(s)]; i < c.k_parts[size_t(s) + 1]; ++i)
          if (largest[size_t(i * of_lse + d)] > -std::numeric_limits<Acc>::infinity())
            total += sum[size_t(i * of_lse + d)] * std::exp(largest[size_t(i * of_lse + d)] - top);
        kept[size_t(s * of_lse + d)] = total == 0 ? -std::numeric_limits<Acc>::infinity() : top + std::log(total);
      }
  }

  // The first part of each sequence becomes the sum of all its parts; body(sequence, head, state) for each.
  template <typename Body>
  void add_parts(std::vector<Acc>& sums, const std::vector<int64_t>& parts, Body body) {
    torch::stable::parallel_for(0, p.sequences * p.kv_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t s = t / p.kv_heads, head = t % p.kv_heads, from = parts[size_t(s)], to = parts[size_t(s) + 1];
        Acc* whole = sums.data() + from * of_states + head * p.state_size;
        for (int64_t i = from + 1; i < to; ++i) {
          const Acc* more = sums.data() + i * of_states + head * p.state_size;
          for (int64_t j = 0; j < p.state_size; ++j) whole[j] += more[j];
        }
        std::fill(whole + place(0, p.width) + p.depth, whole + place(p.depth, 0), Acc(0));  // the pads of z meet those of phi
        body(s, head, whole);
      }
    });
  }
  // element [f][e] of the packed state: that of the tensor [F + 1][E + 1]
  int64_t place(int64_t f, int64_t e) const {
    const int64_t z = int64_t(p.depth) * p.width_pad;
    if (f < p.depth) return e < p.width ? f * p.width_pad + e : z + f;
    return z + p.depth_pad + (e < p.width ? e : p.width_pad);
  }
  int64_t tensor_at(int64_t s, int64_t head, int64_t f, int64_t e) const {
    return ((s * p.kv_heads + head) * (p.depth + 1) + f) * (p.width + 1) + e;
  }

  // Of "polar", whose second half of the channels of v takes the halves of the features exchanged: the rows of S in these channels (unless
  // the features are turned once exchanged), and z once more. With `back` the gradients of both come home.
  void exchange(Acc* whole, bool back) const {
    if (p.feature != Feature::polar) return;
    const int64_t half = p.depth / 2;
    Acc *z = whole + place(0, p.width), *exchanged = whole + place(p.depth, p.width) + 1;
    for (int64_t f = 0; f < half && !p.pairs; ++f)
      for (int64_t e = p.width / 2; e < p.width; ++e) std::swap(whole[place(f, e)], whole[place(f + half, e)]);
    for (int64_t f = 0; f < p.depth; ++f) {
      if (back) z[f] += exchanged[(f + half) % p.depth];
      else exchanged[f] = z[(f + half) % p.depth];
    }
  }
  // A tensor of `kept` has depth numbers a head of "softmax", the kernels' rows are whole vectors.
  template <typename Body>
  void each_kept(int64_t count, Body body) const {
    const int64_t width = p.feature == Feature::softmax ? p.depth : p.kept_size;
    for (int64_t i = 0; i < count; ++i) body(i, size_t(i / width * p.kept_size + i % width));
  }

  void forward(Tensor& state, Tensor& tensor_kept) {
    keep();
    states.assign(size_t(c.k_parts.back() * of_states), Acc(0));
    c.over(c.k_parts, true, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, void* scratch) {
      c.kernels->keys(p, s, first, last, kept_of(s), states.data() + i * of_states, scratch);
    });
    Acc* out = static_cast<Acc*>(state.mutable_data_ptr());
    add_parts(states, c.k_parts, [&](int64_t s, int64_t head, Acc* whole) {
      for (int64_t f = 0; f <= p.depth; ++f)
        for (int64_t e = 0; e <= p.width; ++e) out[tensor_at(s, head, f, e)] = whole[place(f, e)];
      exchange(whole, false);
    });
    Acc* logs = static_cast<Acc*>(tensor_kept.mutable_data_ptr());
    each_kept(tensor_kept.numel(), [&](int64_t i, size_t at) { logs[i] = kept[at]; });
    c.over(c.q_parts, false, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t, void* scratch) {
      c.kernels->queries(p, s, first, last, kept_of(s), states.data() + c.k_parts[size_t(s.number)] * of_states, scratch);
    });
  }

  // dst [width][depth_pad] = S transposed, its pads 0
  void across(const Acc* state, Acc* dst) const {
    for (int64_t e = 0; e < p.width; ++e)
      for (int64_t f = 0; f < p.depth; ++f) dst[e * p.depth_pad + f] = state[f * p.width_pad + e];
  }

  // body(sequence, first, last, part, sums, spread, scratch) for all parts: gradients of parameters go to as many sums as the shape has
  // parts, at most 32. What the spread of "hash" gets is known once all tokens were seen: then they are seen twice, and shift is what it
  // leaves for each distance; count(sequence): how many tokens it was taken over.
  template <typename Body, typename Count, typename Again>
  void with_sums(const std::vector<int64_t>& parts, bool of_keys, bool of_x, bool of_map, std::vector<Acc>& shift, Count count, Again again,
                 Body body) {
    const int64_t slots = std::min<int64_t>(parts.back(), 32), heads = of_keys ? p.kv_heads : p.heads;
    const size_t before = sums.size();
    if (of_map) sums.resize(before + size_t(slots * of_sums));
    if (p.feature == Feature::hash && (of_x || of_map)) {
      std::vector<Acc> found(size_t(parts.back() * heads));
      c.over(parts, of_keys, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, void* scratch) {
        body(s, first, last, i, nullptr, found.data() + i * heads, scratch);
      });
      shift.assign(size_t(p.sequences * heads), Acc(0));
      for (int64_t s = 0; s < p.sequences; ++s)
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t i = parts[size_t(s)]; i < parts[size_t(s) + 1]; ++i) shift[size_t(s * heads + h)] += found[size_t(i * heads + h)];
          shift[size_t(s * heads + h)] /= std::max(count(s), Acc(1)) * Acc(p.map.middle);
        }
      again();
    }
    if (!of_map)
      return c.over(parts, of_keys, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, void* scratch) {
        body(s, first, last, i, nullptr, nullptr, scratch);
      });
    c.over(parts, of_keys, slots, [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, int64_t slot, void* scratch) {
      body(s, first, last, i, sums.data() + before + size_t(slot * of_sums), nullptr, scratch);
    });
  }

  void backward(const Tensor& state, const Tensor& tensor_kept, const OptTensor& dstate, bool of_keys, bool of_map) {
    const Acc *saved = static_cast<const Acc*>(state.const_data_ptr()), *logs = static_cast<const Acc*>(tensor_kept.const_data_ptr());
    const Acc* upstream = dstate ? static_cast<const Acc*>(dstate->const_data_ptr()) : nullptr;
    kept.assign(size_t(p.sequences * of_kept), Acc(0));
    each_kept(tensor_kept.numel(), [&](int64_t i, size_t at) { kept[at] = logs[i]; });
    std::vector<Acc> transposed(size_t(p.sequences * of_across)), shift(p.feature == Feature::softmax ? kept.size() : 0), shift_of_q;
    states.assign(size_t(p.sequences * of_states), Acc(0));
    torch::stable::parallel_for(0, p.sequences * p.kv_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        Acc* whole = states.data() + t * p.state_size;
        for (int64_t f = 0; f <= p.depth; ++f)
          for (int64_t e = 0; e <= p.width; ++e) whole[place(f, e)] = saved[tensor_at(t / p.kv_heads, t % p.kv_heads, f, e)];
        exchange(whole, false);
        across(whole, transposed.data() + t * p.width * p.depth_pad);
      }
    });
    std::vector<Acc> dstates(size_t(c.q_parts.back() * of_states));
    const auto shift_at = [](const std::vector<Acc>& all, int64_t at) { return all.empty() ? nullptr : all.data() + at; };
    if (p.dout.data)
      with_sums(
          c.q_parts, false, p.dq.data, of_map, shift_of_q, [&](int64_t s) { return Acc(c.sequences[size_t(s)].q_count); },
          [&] { std::fill(dstates.begin(), dstates.end(), Acc(0)); },
          [&](const LinearSequence& s, int32_t first, int32_t last, int64_t i, Acc* to, Acc* spread, void* scratch) {
            c.kernels->query_grads(p, s, first, last, kept_of(s), shift_at(shift_of_q, s.number * p.heads),
                                   states.data() + s.number * of_states, transposed.data() + s.number * of_across,
                                   dstates.data() + i * of_states, to, spread, scratch);
          });
    if (!of_keys) return;
    add_parts(dstates, c.q_parts, [&](int64_t s, int64_t head, Acc* whole) {
      exchange(whole, true);
      if (upstream)
        for (int64_t f = 0; f <= p.depth; ++f)
          for (int64_t e = 0; e <= p.width; ++e) whole[place(f, e)] += upstream[tensor_at(s, head, f, e)];
      across(whole, transposed.data() + (s * p.kv_heads + head) * p.width * p.depth_pad);
      if (p.feature != Feature::softmax) return;
      const Acc* from = states.data() + s * of_states + head * p.state_size;
      for (int64_t f = 0; f < p.depth; ++f) {
        Acc sum = 0;
        for (int64_t e = 0; e <= p.width; ++e) sum += whole[place(f, e)] * from[place(f, e)];
        shift[size_t((s * p.kv_heads + head) * p.depth_pad + f)] = sum;
      }
    });
    with_sums(
        c.k_parts, true, p.dk.data, of_map, shift, [&](int64_t s) { return saved[tensor_at(s, 0, p.depth, p.width)]; }, [] {},
        [&](const LinearSequence& s, int32_t first, int32_t last, int64_t, Acc* to, Acc* spread, void* scratch) {
          const int64_t of_shift = p.feature == Feature::softmax ? of_kept : p.kv_heads;
          c.kernels->key_grads(p, s, first, last, kept_of(s), shift_at(shift, s.number * of_shift),
                               dstates.data() + c.q_parts[size_t(s.number)] * of_states, transposed.data() + s.number * of_across, to,
                               spread, scratch);
        });
  }

  // The gradient of parameter i.
  OptTensor of_parameter(int64_t i, const OptTensor& like) const {
    if (!like) return std::nullopt;
    const LinearParameters& m = p.map;
    if (i == 0) return packs.gradient(p, sums, *like, 0, p.inner, p.inner_pad, packs.factor);
    const bool hash = p.feature == Feature::hash, polar = p.feature == Feature::polar;
    if (i == 2) return packs.gradient(p, sums, *like, m.rows_size + m.second_size, m.middle, m.middle_pad, Acc(1));
    return packs.gradient(p, sums, *like, m.rows_size, hash ? p.depth : polar ? p.inner : m.middle,
                          hash ? p.depth_pad : polar ? p.inner_pad : m.middle_pad, Acc(1));
  }
};

std::vector<int64_t> sizes_of(const Tensor& t, int64_t axes = 7) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < axes; ++axis) sizes.push_back(t.size(axis));
  return sizes;
}

// What every sequence and head leaves for a table [S|1, N, H|1, pairs], summed in order.
template <typename Acc>
Tensor table_sum(const std::vector<Acc>& parts, const Tensor& table, int64_t heads) {
  const int64_t tokens = table.size(1), pairs = table.size(3), row = tokens * heads * pairs;
  Tensor sum = new_tensor(sizes_of(table, 4), sizeof(Acc) == 8 ? Dtype::f64 : Dtype::f32);
  Acc* to = static_cast<Acc*>(sum.mutable_data_ptr());
  std::fill(to, to + sum.numel(), Acc(0));
  for (int64_t s = 0; row && s < int64_t(parts.size()) / row; ++s)
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t j = 0; j < pairs; ++j)
          to[(((table.size(0) == 1 ? 0 : s) * tokens + n) * table.size(2) + (table.size(2) == 1 ? 0 : h)) * pairs + j] +=
              parts[size_t(s * row + (n * heads + h) * pairs + j)];
  return sum;
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(VITKERN_LINEAR_ARGUMENTS) {
  const LinearArguments given = VITKERN_LINEAR_OPTIONS;
  LinearCall c(given);
  LinearProblem& p = c.p;
  const Dtype acc = c.wide ? Dtype::f64 : Dtype::f32;
  std::vector<int64_t> sizes = sizes_of(q);
  sizes[6] = p.width;
  Tensor out = new_tensor(sizes, p.v.dtype);
  Tensor state = new_tensor({p.sequences, p.kv_heads, p.depth + 1, p.width + 1}, acc);
  Tensor kept = new_tensor({p.sequences, p.kv_heads, p.feature == Feature::softmax ? p.depth : p.kept_size}, acc);
  p.out = as_map(out);
  if (by_pairs) {
    c.over_heads(c.kernels->pairs);
    return {out, new_tensor({p.sequences, p.kv_heads, 0, 0}, acc), new_tensor({p.sequences, p.kv_heads, 0}, acc)};
  }
  if (c.wide) Run<double>(c, given).forward(state, kept);
  else Run<float>(c, given).forward(state, kept);
  return {out, state, kept};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor, OptTensor>
linear_attention_bwd(
    OptTensor dout, OptTensor dstate, OptTensor /*dkept*/, Tensor state, Tensor kept, VITKERN_LINEAR_ARGUMENTS, int64_t need) {
  const LinearArguments given = VITKERN_LINEAR_OPTIONS;
  LinearCall c(given);
  LinearProblem& p = c.p;
  OptTensor dq, dk, dv, dweight;
  if (need & 1) p.dq = as_map(*(dq = new_tensor(sizes_of(q), p.q.dtype)));
  if (need & 2) p.dk = as_map(*(dk = new_tensor(sizes_of(k), p.k.dtype)));
  if (need & 4) p.dv = as_map(*(dv = new_tensor(sizes_of(v), p.v.dtype)));
  if (need & 8 && key_weight) p.dweight = as_map(*(dweight = new_tensor(sizes_of(k, 6), p.weight.dtype)), 6);
  if (dout) p.dout = as_map(*dout);
  else if (dq && dq->numel()) std::memset(dq->mutable_data_ptr(), 0, size_t(dq->numel() * size_of(p.q.dtype)));
  if (by_pairs) {
    if (dout) c.over_heads(c.kernels->pair_grads);
    for (const OptTensor* t : {&dk, &dv, &dweight})
      if (!dout && *t && (*t)->numel()) std::memset((*t)->mutable_data_ptr(), 0, size_t((*t)->numel() * size_of(dtype_of(**t, kOp))));
    return {dq, dk, dv, dweight, {}, {}, {}, {}, {}, {}, {}};
  }
  check(state.is_contiguous() && kept.is_contiguous(), kOp, "what the forward saved must be contiguous");
  if (dstate && !dstate->is_contiguous()) dstate = torch::stable::contiguous(*dstate);
  std::vector<OptTensor> tables(4), parameters(3);
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    std::vector<std::vector<Acc>> sums(4);
    void** into[] = {&p.dcos_q, &p.dsin_q, &p.dcos_k, &p.dsin_k};
    for (int64_t side = 0; side < 2 && cos_q; ++side) {
      if (!(need >> (4 + 2 * side) & 3)) continue;
      const int64_t all = (p.cu_q ? p.batch : p.sequences) * (side ? int64_t(p.k_tokens) * p.kv_heads : int64_t(p.q_tokens) * p.heads);
      for (int64_t i = 2 * side; i < 2 * side + 2; ++i) {
        sums[size_t(i)].assign(size_t(all * p.pairs), Acc(0));
        *into[i] = sums[size_t(i)].data();
      }
    }
    Run<Acc> task(c, given);
    const bool of_map = need >> 8 & 7 && map0;
    task.backward(state, kept, dstate, dk || dv || dweight || p.dcos_k || of_map, of_map);
    const OptTensor *turns[] = {&cos_q, &sin_q, &cos_k, &sin_k}, *maps[] = {&map0, &map1, &map2};
    for (int64_t i = 0; i < 4; ++i)
      if (need >> (4 + i) & 1 && *turns[i]) tables[size_t(i)] = table_sum(sums[size_t(i)], **turns[i], i < 2 ? p.heads : p.kv_heads);
    for (int64_t i = 0; i < 3; ++i)
      if (need >> (8 + i) & 1) parameters[size_t(i)] = task.of_parameter(i, *maps[i]);
  };
  c.wide ? run(double()) : run(float());
  return {dq, dk, dv, dweight, tables[0], tables[1], tables[2], tables[3], parameters[0], parameters[1], parameters[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("linear_attention_fwd", TORCH_BOX(&linear_attention_fwd));
  m.impl("linear_attention", TORCH_BOX(&linear_attention_fwd));
  m.impl("linear_attention_bwd", TORCH_BOX(&linear_attention_bwd));
}

}  // namespace vitkern
