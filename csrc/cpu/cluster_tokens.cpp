// cluster_tokens on the CPU: lists of real tokens, panels and blocks of rows to threads, and what is chosen between passes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "distance_groups.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "cluster_tokens";

typedef void (*Pass)(const ClusterProblem&, const DistanceGroup&, int32_t, int32_t, void*);

// One call in one arithmetic type.
template <typename Acc>
class Clustering {
 public:
  Clustering(const Tensor& x, const OptTensor& mask, int64_t k, const ClusterKernels& kernels, Acc* distance, int32_t* label,
             int32_t* index)
      : kernels_(kernels), k_(int32_t(k)), batch_(x.size(0)), distance_(distance), label_(label), index_(index) {
    p_.distances.x = p_.distances.y = as_rows(x, kOp);
    p_.distances.width = int32_t(x.size(2));
    p_.tokens = int32_t(x.size(1));
    p_.value = distance;
    p_.place = label;
    real_.resize(size_t(batch_));
    const bool* is_real = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    const int64_t mask_batch = mask ? mask->stride(0) : 0, mask_token = mask ? mask->stride(1) : 0;
    for (int64_t b = 0; b < batch_; ++b) {
      for (int32_t i = 0; i < p_.tokens; ++i)
        if (!is_real || is_real[b * mask_batch + i * mask_token]) real_[size_t(b)].push_back(i);
      std::fill_n(label + b * p_.tokens, p_.tokens, k_);
      std::fill_n(distance + b * p_.tokens, p_.tokens, Acc(0));
      std::fill_n(index + b * k, k, 0);
    }
  }

  void nearest(const Tensor& centers) {
    p_.distances.y = as_rows(centers, kOp);
    std::vector<int32_t> all(static_cast<size_t>(k_));
    for (int32_t c = 0; c < k_; ++c) all[size_t(c)] = c;
    assign(std::vector<std::vector<int32_t>>(size_t(batch_), all));
  }

  void density_peaks(int64_t neighbors) {
    std::vector<Acc> spread(size_t(batch_ * p_.tokens)), delta(spread.size());
    p_.neighbors = int32_t(std::min<int64_t>(neighbors, p_.tokens));
    p_.value = spread.data();
    among(real_, kernels_.spread);
    auto ranked = real_;
    for (int64_t b = 0; b < batch_; ++b) {
      auto& order = ranked[size_t(b)];
      Acc* s = &spread[size_t(b * p_.tokens)];
      const Acc count = Acc(std::min<int64_t>(neighbors, int64_t(order.size()))) * Acc(p_.distances.width);
      for (int32_t i : order) s[i] /= count;
      std::stable_sort(order.begin(), order.end(), [s](int32_t i, int32_t j) { return s[i] < s[j]; });
    }
    p_.neighbors = 0;
    p_.value = delta.data();
    among(ranked, kernels_.before);
    std::vector<std::vector<int32_t>> centres(static_cast<size_t>(batch_));
    for (int64_t b = 0; b < batch_; ++b) {
      const auto& order = ranked[size_t(b)];
      Acc *score = &delta[size_t(b * p_.tokens)], *s = &spread[size_t(b * p_.tokens)];
      for (size_t r = 0; r < order.size(); ++r) {
        // The densest token has the largest delta of all, whatever it is: nothing scores higher.
        const Acc squared = r == 0 ? std::numeric_limits<Acc>::infinity() : score[order[r]] / Acc(p_.distances.width);
        score[order[r]] = std::log(squared) / 2 - s[order[r]];
      }
      centres[size_t(b)] = largest(b, score);
    }
    p_.value = distance_;
    join(centres);
  }

  void medoids(const OptTensor& weight, int64_t iters) {
    std::vector<Acc> w(size_t(batch_ * p_.tokens), Acc(1)), cost(w.size());
    if (weight) {
      const RowsView v = as_rows(*weight, kOp);
      for (int64_t i = 0; i < batch_ * p_.tokens; ++i)
        w[size_t(i)] = scalar<Acc>(v.data, i / p_.tokens * v.batch + i % p_.tokens * v.token, v.dtype);
    }
    auto centres = weight ? std::vector<std::vector<int32_t>>(static_cast<size_t>(batch_)) : farthest();
    if (weight)
      for (int64_t b = 0; b < batch_; ++b) centres[size_t(b)] = largest(b, &w[size_t(b * p_.tokens)]);
    join(centres);
    for (int64_t turn = 0; turn < iters; ++turn) {
      std::vector<std::vector<int32_t>> members(size_t(batch_ * k_));
      for (int64_t b = 0; b < batch_; ++b)
        for (int32_t i : real_[size_t(b)]) members[size_t(b * k_ + label_[b * p_.tokens + i])].push_back(i);
      p_.weight = w.data();
      p_.value = cost.data();
      among(members, kernels_.sums);
      for (size_t c = 0; c < members.size(); ++c) {
        const int64_t b = int64_t(c) / k_;
        const Acc* costs = &cost[size_t(b * p_.tokens)];
        if (c % size_t(k_) == 0) centres[size_t(b)].clear();
        if (!members[c].empty())
          centres[size_t(b)].push_back(*std::min_element(members[c].begin(), members[c].end(),
                                                         [costs](int32_t i, int32_t j) { return costs[i] < costs[j]; }));
      }
      for (auto& chosen : centres) std::sort(chosen.begin(), chosen.end());
      p_.value = distance_;
      join(centres);
    }
  }

  void agglomerate(Linkage linkage) {
    int64_t most = 0;
    for (const auto& real : real_) most = std::max(most, int64_t(real.size()));
    const int64_t bytes = kernels_.agglomerate_bytes(most, p_.distances.width);
    torch::stable::parallel_for(0, batch_, 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes, false);
      std::vector<int32_t> root(static_cast<size_t>(most)), slot(root);
      for (int64_t b = first; b < last; ++b) {
        const auto& real = real_[size_t(b)];
        const DistanceGroup g{b, real.data(), nullptr, int32_t(real.size()), 0, 0};
        kernels_.agglomerate(p_.distances.x, p_.distances.width, g, k_, linkage, root.data(), scratch.data());
        int32_t heads = 0;
        for (size_t i = 0; i < real.size(); ++i) {
          if (root[i] == int32_t(i)) {
            index_[b * k_ + heads] = real[i];
            slot[i] = heads++;
          }
          label_[b * p_.tokens + real[i]] = slot[size_t(root[i])];  // a cluster's first token comes first
        }
      }
    });
  }

 private:
  // The k largest scores of the sample's real tokens, ties by position and NaN last; as positions, ascending.
  std::vector<int32_t> largest(int64_t b, const Acc* score) const {
    auto order = real_[size_t(b)];
    const auto value = [score](int32_t i) { return std::isnan(score[i]) ? -std::numeric_limits<Acc>::infinity() : score[i]; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return value(i) > value(j); });
    if (order.size() > size_t(k_)) order.resize(size_t(k_));
    std::sort(order.begin(), order.end());
    return order;
  }

  std::vector<std::vector<int32_t>> farthest() {
    std::vector<std::vector<int32_t>> chosen(static_cast<size_t>(batch_)), last(chosen);
    std::vector<Acc> gap(size_t(batch_ * p_.tokens), std::numeric_limits<Acc>::infinity());
    for (int32_t turn = 0; turn < k_; ++turn) {
      for (int64_t b = 0; b < batch_; ++b) {
        Acc* own = &gap[size_t(b * p_.tokens)];
        if (turn > 0)
          for (int32_t i : real_[size_t(b)]) own[i] = std::min(own[i], distance_[b * p_.tokens + i]);
        for (int32_t i : chosen[size_t(b)]) own[i] = -1;
        last[size_t(b)].clear();
        if (real_[size_t(b)].size() <= size_t(turn)) continue;
        last[size_t(b)].push_back(*std::max_element(real_[size_t(b)].begin(), real_[size_t(b)].end(),
                                                    [own](int32_t i, int32_t j) { return own[i] < own[j]; }));
        chosen[size_t(b)].push_back(last[size_t(b)][0]);
      }
      if (turn + 1 < k_) assign(last);
    }
    for (auto& places : chosen) std::sort(places.begin(), places.end());
    return chosen;
  }

  // Every real token's nearest of the listed columns of its sample.
  void assign(const std::vector<std::vector<int32_t>>& columns) { run(real_, columns, kernels_.nearest); }

  // The same, and a centre joins itself.
  void join(const std::vector<std::vector<int32_t>>& centres) {
    assign(centres);
    for (int64_t b = 0; b < batch_; ++b)
      for (size_t c = 0; c < centres[size_t(b)].size(); ++c) {
        const int32_t i = centres[size_t(b)][c];
        index_[b * k_ + int64_t(c)] = i;
        label_[b * p_.tokens + i] = int32_t(c);
        distance_[b * p_.tokens + i] = 0;
      }
  }

  // The pass on each list against itself; lists of a sample stand together.
  void among(const std::vector<std::vector<int32_t>>& lists, Pass pass) { run(lists, lists, pass); }

  void run(const std::vector<std::vector<int32_t>>& rows, const std::vector<std::vector<int32_t>>& columns, Pass pass) {
    if (batch_ == 0) return;
    DistanceGroups groups(p_.distances, int64_t(rows.size()) / batch_, rows, columns, kernels_.panel, sizeof(Acc));
    const int64_t bytes = kernels_.scratch_bytes(p_, kRowBlock);
    groups.pack(kernels_.pack, bytes);
    groups.over_rows([&](const DistanceGroup& g, int32_t first, int32_t last, void* scratch) { pass(p_, g, first, last, scratch); },
                     bytes);
  }

  const ClusterKernels& kernels_;
  ClusterProblem p_{};
  int32_t k_;
  int64_t batch_;
  Acc* distance_;
  int32_t *label_, *index_;
  std::vector<std::vector<int32_t>> real_;
};

template <typename Acc>
void run(const Tensor& x, const OptTensor& centers, const OptTensor& mask, const OptTensor& weight, const std::string& method,
         int64_t k, int64_t neighbors, int64_t iters, const std::string& linkage, const ClusterKernels& kernels,
         Tensor& label, Tensor& index, Tensor& distance) {
  Clustering<Acc> clustering(x, mask, k, kernels, static_cast<Acc*>(distance.mutable_data_ptr()),
                             static_cast<int32_t*>(label.mutable_data_ptr()), static_cast<int32_t*>(index.mutable_data_ptr()));
  if (method == "nearest") clustering.nearest(*centers);
  else if (method == "dpc_knn") clustering.density_peaks(neighbors);
  else if (method == "kmedoids") clustering.medoids(weight, iters);
  else
    clustering.agglomerate(linkage == "average" ? Linkage::average
                           : linkage == "single" ? Linkage::single
                                                 : Linkage::complete);
}

std::tuple<Tensor, Tensor, Tensor> cluster_tokens(Tensor x, OptTensor centers, OptTensor mask, OptTensor weight,
                                                  std::string method, int64_t k, int64_t neighbors, int64_t iters,
                                                  std::string linkage, std::string /*gpu*/) {
  using torch::headeronly::ScalarType;
  check(x.dim() == 3 && x.size(1) < (int64_t(1) << 30), kOp, "x must have shape [B, N, C]");
  const int64_t batch = x.size(0), tokens = x.size(1);
  check(method != "nearest" || (centers && centers->dim() == 3 && centers->size(0) == batch && centers->size(1) == k &&
                                centers->size(2) == x.size(2) && centers->scalar_type() == x.scalar_type()),
        kOp, "centers must have shape [B, k, C] and the dtype of x");
  check(method == "nearest" || method == "dpc_knn" || method == "kmedoids" || method == "agglomerative", kOp,
        "method must be nearest, dpc_knn, kmedoids or agglomerative");
  check(linkage == "average" || linkage == "single" || linkage == "complete", kOp,
        "linkage must be average, single or complete");
  check(k >= 1 && neighbors >= 1 && iters >= 0, kOp, "k and k_neighbors must be at least 1, iters at least 0");
  for (const OptTensor* t : {&mask, &weight})
    check(!*t || ((*t)->dim() == 2 && (*t)->size(0) == batch && (*t)->size(1) == tokens), kOp,
          "mask and weight must have shape [B, N]");
  check(!mask || mask->scalar_type() == ScalarType::Bool, kOp, "mask must be bool");
  const bool wide = dtype_of(x, kOp) == Dtype::f64;
  Tensor label = torch::stable::empty({batch, tokens}, ScalarType::Int);
  Tensor index = torch::stable::empty({batch, k}, ScalarType::Int);
  Tensor distance = new_tensor({batch, tokens}, wide ? Dtype::f64 : Dtype::f32);
  if (wide)
    run<double>(x, centers, mask, weight, method, k, neighbors, iters, linkage, kernels().cluster_f64, label, index, distance);
  else
    run<float>(x, centers, mask, weight, method, k, neighbors, iters, linkage, kernels().cluster_f32, label, index, distance);
  return {label, index, distance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) { m.impl("cluster_tokens", TORCH_BOX(&cluster_tokens)); }

}  // namespace vitkern
