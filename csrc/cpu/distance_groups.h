// Groups of rows and columns to threads: panels are packed first, then blocks of rows stream over them.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "distances.h"
#include "plans.h"

namespace vitkern {

constexpr int64_t kRowBlock = 96;  // rows of a task: with a panel they fit the caches

class DistanceGroups {
 public:
  // `rows` and `columns` hold one list per group, `each` groups to a sample.
  DistanceGroups(DistanceProblem& p, int64_t each, const std::vector<std::vector<int32_t>>& rows,
                 const std::vector<std::vector<int32_t>>& columns, int32_t panel, int64_t element)
      : p_(p) {
    for (size_t g = 0; g < rows.size(); ++g) {
      groups_.push_back({int64_t(g) / each, rows[g].data(), columns[g].data(), int32_t(rows[g].size()),
                         int32_t(columns[g].size()), int64_t(panels_.size())});
      const int64_t count = (int64_t(columns[g].size()) + panel - 1) / panel;
      for (int64_t i = 0; i < count; ++i) panels_.push_back({int32_t(g), int32_t(i)});
      const int64_t n = int64_t(rows[g].size()), blocks = (n + kRowBlock - 1) / kRowBlock;
      for (int64_t i = 0; i < blocks; ++i) blocks_.push_back({int32_t(g), int32_t(i * kRowBlock)});
    }
    const int64_t columns_held = int64_t(panels_.size()) * panel;
    packed_.reset(new Scratch(columns_held * p.width * element + 64, false));
    norms_.reset(new Scratch(columns_held * element + 64, false));
    p.packed = packed_->data();
    p.norms = norms_->data();
  }

  const DistanceGroup& group(int64_t g) const { return groups_[size_t(g)]; }

  template <typename Pack>
  void pack(Pack pack, int64_t bytes) const {
    torch::stable::parallel_for(0, int64_t(panels_.size()), 4, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes, false);
      for (int64_t t = first; t < last; ++t)
        pack(p_, groups_[size_t(panels_[size_t(t)].group)], panels_[size_t(t)].at, scratch.data());
    });
  }

  // body(group, first row, last row, scratch)
  template <typename Body>
  void over_rows(Body body, int64_t bytes) const {
    torch::stable::parallel_for(0, int64_t(blocks_.size()), 1, [&](int64_t first, int64_t last) {
      Scratch scratch(bytes, false);
      for (int64_t t = first; t < last; ++t) {
        const DistanceGroup& g = groups_[size_t(blocks_[size_t(t)].group)];
        const int32_t at = blocks_[size_t(t)].at;
        body(g, at, std::min<int32_t>(g.row_count, at + int32_t(kRowBlock)), scratch.data());
      }
    });
  }

 private:
  struct Part {
    int32_t group, at;
  };
  DistanceProblem& p_;
  std::vector<DistanceGroup> groups_;
  std::vector<Part> panels_, blocks_;
  std::unique_ptr<Scratch> packed_, norms_;
};

}  // namespace vitkern
