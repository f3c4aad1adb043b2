// bipartite_match on the CPU: who is source and destination, panels and blocks of sources to threads.
#include "bipartite_match.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "bipartite_match";
constexpr int64_t kBlock = 96;  // sources of a task: with a panel they fit the caches

// Everything about a call that lives beside the problem.
struct Lists {
  std::vector<int32_t> sources, destinations, source_count, destination_count;
};

// Writes the role of every token and lists sources and destinations by position.
void set_roles(MatchProblem& p, Lists& lists, const std::optional<Tensor>& given, int64_t protect, int8_t* role) {
  const int64_t n = p.tokens, batch = p.batch;
  lists.sources.resize(size_t(batch * n));
  lists.destinations.resize(size_t(batch * n));
  lists.source_count.resize(size_t(batch));
  lists.destination_count.resize(size_t(batch));
  const int8_t* data = given ? static_cast<const int8_t*>(given->const_data_ptr()) : nullptr;
  const int64_t step = given ? given->stride(1) : 0, jump = given && given->size(0) > 1 ? given->stride(0) : 0;
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 65536 / std::max<int64_t>(n, 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int32_t *s = &lists.sources[size_t(b * n)], *d = &lists.destinations[size_t(b * n)];
      for (int64_t i = 0; i < n; ++i) {
        const int8_t r = data ? data[b * jump + i * step] : i < protect ? int8_t(kProtected) : int8_t(i & 1);
        role[b * n + i] = r;
        if (r == kSource) *s++ = int32_t(i);
        else if (r == kDestination) *d++ = int32_t(i);
        p.score[b * n + i] = -std::numeric_limits<float>::infinity();
        p.dst[b * n + i] = int32_t(i);
      }
      lists.source_count[size_t(b)] = int32_t(s - &lists.sources[size_t(b * n)]);
      lists.destination_count[size_t(b)] = int32_t(d - &lists.destinations[size_t(b * n)]);
    }
  });
  p.sources = lists.sources.data();
  p.destinations = lists.destinations.data();
  p.source_count = lists.source_count.data();
  p.destination_count = lists.destination_count.data();
}

void set_limits(MatchProblem& p, const std::optional<Tensor>& segments, const std::vector<int64_t>& window) {
  if (segments) {
    p.segments = static_cast<const int32_t*>(segments->const_data_ptr());
    p.segment_batch = segments->size(0) > 1 ? segments->stride(0) : 0;
    p.segment_token = segments->stride(1);
  }
  const auto narrow = [](int64_t w) { return int32_t(std::min<int64_t>(w, std::numeric_limits<int32_t>::max() / 2)); };
  if (window.empty()) return;
  check(window.size() == 1 || window.size() == 4, kOp, "window must have 1 or 4 entries");
  p.window.axes = window.size() == 1 ? 1 : 2;
  p.window.sides[0] = narrow(window[0]);
  if (p.window.axes == 2) {
    check(window[2] >= 1 && window[3] >= 1 && window[2] * window[3] <= p.tokens, kOp, "the grid must hold at most all tokens");
    p.window.sides[1] = narrow(window[1]);
    p.window.grid_width = int32_t(window[3]);
    p.window.grid_start = int32_t(p.tokens - window[2] * window[3]);
  }
}

void run(MatchProblem& p, const MatchKernels& kernels, int64_t element) {
  const int64_t most_sources = *std::max_element(p.source_count, p.source_count + p.batch);
  const int64_t most_destinations = *std::max_element(p.destination_count, p.destination_count + p.batch);
  if (most_sources == 0 || most_destinations == 0) return;
  p.panels = (most_destinations + kernels.panel - 1) / kernels.panel;
  Scratch packed(p.batch * p.panels * kernels.panel * p.width * element, false);
  p.packed = packed.data();
  const int64_t blocks = (most_sources + kBlock - 1) / kBlock;  // each some whole tiles
  const int64_t tiles = (most_sources + kernels.rows - 1) / kernels.rows;
  const int64_t bytes = kernels.scratch_bytes(p, ((tiles + blocks - 1) / blocks + 1) * kernels.rows);
  const int64_t grain = std::max<int64_t>(1, 16384 / (kernels.panel * p.width));
  torch::stable::parallel_for(0, p.batch * p.panels, grain, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes, false);
    for (int64_t t = first; t < last; ++t) kernels.pack(p, t / p.panels, t % p.panels, scratch.data());
  });
  torch::stable::parallel_for(0, p.batch * blocks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(bytes, false);
    for (int64_t t = first; t < last; ++t) {
      const int64_t b = t / blocks, i = t % blocks, count = p.source_count[b];
      const int64_t own = (count + kernels.rows - 1) / kernels.rows;
      const int64_t from = own * i / blocks * kernels.rows, to = std::min(count, own * (i + 1) / blocks * kernels.rows);
      if (from < to && p.destination_count[b] > 0) kernels.match(p, b, int32_t(from), int32_t(to), scratch.data());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> bipartite_match(Tensor metric, std::optional<Tensor> role,
                                                   std::optional<Tensor> segments, int64_t protect,
                                                   std::vector<int64_t> window, bool cosine, double eps,
                                                   std::string /*gpu*/) {
  using torch::headeronly::ScalarType;
  const bool many = metric.dim() == 4;
  check(many || metric.dim() == 3, kOp, "metric must have shape [B, N, C] or [B, N, H, C]");
  MatchProblem p{};
  p.batch = metric.size(0);
  check(metric.size(1) < (int64_t(1) << 30), kOp, "metric holds too many tokens");
  p.tokens = int32_t(metric.size(1));
  p.heads = many ? int32_t(metric.size(2)) : 1;
  p.width = int32_t(metric.size(many ? 3 : 2));
  check(p.heads >= 1, kOp, "metric must have at least one head");
  for (const auto* t : {&role, &segments})
    check(!*t || ((*t)->dim() == 2 && (*t)->size(1) == p.tokens && ((*t)->size(0) == 1 || (*t)->size(0) == p.batch)), kOp,
          "role and segments must have shape [B or 1, N]");
  check(!role || role->scalar_type() == ScalarType::Char, kOp, "role must be int8");
  check(!segments || segments->scalar_type() == ScalarType::Int, kOp, "segments must be int32");
  p.metric = static_cast<const char*>(metric.const_data_ptr());
  p.dtype = dtype_of(metric, kOp);
  p.batch_stride = metric.stride(0);
  p.token_stride = metric.stride(1);
  p.head_stride = many ? metric.stride(2) : 0;
  p.dim_stride = metric.stride(many ? 3 : 2);
  p.cosine = cosine;
  p.eps = eps;
  Tensor score = new_tensor({p.batch, p.tokens}, Dtype::f32);
  Tensor dst = torch::stable::empty({p.batch, p.tokens}, ScalarType::Int);
  Tensor roles = torch::stable::empty({p.batch, p.tokens}, ScalarType::Char);
  if (p.batch == 0 || p.tokens == 0) return {score, dst, roles};
  p.score = static_cast<float*>(score.mutable_data_ptr());
  p.dst = static_cast<int32_t*>(dst.mutable_data_ptr());
  Lists lists;
  set_roles(p, lists, role, protect, static_cast<int8_t*>(roles.mutable_data_ptr()));
  set_limits(p, segments, window);
  const bool wide = p.dtype == Dtype::f64;
  run(p, wide ? kernels().match_f64 : kernels().match_f32, wide ? 8 : 4);
  return {score, dst, roles};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) { m.impl("bipartite_match", TORCH_BOX(&bipartite_match)); }

}  // namespace vitkern
