// window_rows and window_sum on the CPU: rows of a map to windows and back. Copies, but for tokens that stand in several windows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
constexpr const char* kOp = "window_rows";

// The places of one call: tables as in vitkern/reference/window_rows.py, of one axis behind the other.
struct Places {
  const int32_t *index, *owners;
  int64_t index_image, owners_image;  // strides, 0 where all images share a row
  Sizes counts, cells, most, lengths;
  Sizes first_index, first_owner;  // where the tables of each axis begin
  int64_t batch, windows = 1, size = 1, tokens = 1;
  size_t last() const { return counts.size() - 1; }
};

void check_table(const Tensor& t, int64_t batch, int64_t columns, const Sizes& sizes, const Sizes& limits) {
  check(t.dim() == 2 && t.scalar_type() == torch::headeronly::ScalarType::Int && t.is_contiguous() &&
            (t.size(0) == 1 || t.size(0) == batch) && t.size(1) == columns,
        kOp, "a table of places must be contiguous int32 [1 or B, places]");
  const int32_t* data = static_cast<const int32_t*>(t.const_data_ptr());
  bool fits = true;
  for (int64_t b = 0; b < t.size(0); ++b)
    for (size_t a = 0; a < sizes.size(); ++a)
      for (int64_t i = 0; i < sizes[a]; ++i) {
        fits &= *data >= -1 && *data < limits[a];
        ++data;
      }
  check(fits, kOp, "a table of places must hold -1 or coordinates of its axis: order must be a permutation");
}

Places prepare(int64_t batch, const Sizes& lengths, const Tensor& index, const Tensor& owners, const Sizes& counts, const Sizes& cells,
               const Sizes& most) {
  const size_t rank = lengths.size();
  check(rank >= 1 && rank <= size_t(kMaxAxes) && counts.size() == rank && cells.size() == rank && most.size() == rank, kOp,
        "a map has 1 to 4 axes, each with windows, cells and owners");
  Places p{};
  p.counts = counts;
  p.cells = cells;
  p.most = most;
  p.lengths = lengths;
  p.batch = batch;
  Sizes of_index, of_owners;
  int64_t columns = 0, owned = 0;
  for (size_t a = 0; a < rank; ++a) {
    check(counts[a] >= 1 && cells[a] >= 1 && most[a] >= 1 && lengths[a] >= 1, kOp, "every axis needs windows, cells and owners");
    p.windows *= counts[a];
    p.size *= cells[a];
    p.tokens *= lengths[a];
    p.first_index.push_back(columns);
    p.first_owner.push_back(owned);
    of_index.push_back(counts[a] * cells[a]);
    of_owners.push_back(lengths[a] * most[a]);
    columns += of_index[a];
    owned += of_owners[a];
  }
  check_table(index, batch, columns, of_index, lengths);
  check_table(owners, batch, owned, of_owners, of_index);
  p.index = static_cast<const int32_t*>(index.const_data_ptr());
  p.owners = static_cast<const int32_t*>(owners.const_data_ptr());
  p.index_image = index.size(0) == 1 ? 0 : columns;
  p.owners_image = owners.size(0) == 1 ? 0 : owned;
  return p;
}

// A row of heads * width elements: strides in bytes.
struct Row {
  int64_t heads, width, head, dim, element;
  bool dense() const { return dim == element && (heads == 1 || head == width * element); }
};

void copy_row(char* to, const char* from, const Row& r) {
  if (r.dense()) {
    memcpy(to, from, size_t(r.heads * r.width * r.element));
    return;
  }
  for (int64_t h = 0; h < r.heads; ++h, to += r.width * r.element) {
    if (r.dim == r.element) memcpy(to, from + h * r.head, size_t(r.width * r.element));
    else
      for (int64_t c = 0; c < r.width; ++c) memcpy(to + c * r.element, from + h * r.head + c * r.dim, size_t(r.element));
  }
}

// Walks all numbers below `sizes`, the last fastest; false behind the end.
bool next(Sizes& at, const Sizes& sizes) {
  for (size_t a = sizes.size(); a-- > 0;) {
    if (++at[a] < sizes[a]) return true;
    at[a] = 0;
  }
  return false;
}

// A number as coordinates below `sizes`.
Sizes coordinates(int64_t number, const Sizes& sizes) {
  Sizes at(sizes.size());
  for (size_t a = sizes.size(); a-- > 0;) {
    at[a] = number % sizes[a];
    number /= sizes[a];
  }
  return at;
}

Sizes without_last(const Sizes& sizes) { return {sizes.begin(), sizes.end() - 1}; }

int64_t grain(int64_t bytes) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(bytes, 1)); }

// The row of a pad, in the map's dtype.
std::vector<char> pad_row(const OptTensor& fill, const Map& map) {
  std::vector<char> row(size_t(map.heads * map.width * size_of(map.view.dtype)), 0);
  if (!fill) return row;
  check(fill->dim() == 2 && fill->size(0) == map.heads && fill->size(1) == map.width, kOp, "fill must have shape [H, D]");
  for (int64_t i = 0; i < map.heads * map.width; ++i)
    set_scalar<double>(row.data(), i, map.view.dtype,
                       scalar<double>(fill->const_data_ptr(), i / map.width * fill->stride(0) + i % map.width * fill->stride(1),
                                      dtype_of(*fill, kOp)));
  return row;
}

Tensor window_rows_fwd(Tensor x, OptTensor fill, Tensor index, Tensor owners, Sizes counts, Sizes cells, Sizes most, std::string /*gpu*/) {
  const Map map = as_map(x, 1, kOp);
  const Places p = prepare(map.batch, map.lengths, index, owners, counts, cells, most);
  const int64_t element = size_of(map.view.dtype), bytes = map.heads * map.width * element;
  Tensor rows = new_tensor({p.batch * p.windows, p.size, map.heads, map.width}, map.view.dtype);
  char* out = static_cast<char*>(rows.mutable_data_ptr());
  const Row row{map.heads, map.width, map.view.head * element, map.view.dim * element, element};
  const std::vector<char> pad = pad_row(fill, map);
  const size_t last = p.last();
  const Sizes outer = without_last(p.cells);
  torch::stable::parallel_for(0, p.batch * p.windows, grain(p.size * bytes), [&](int64_t first, int64_t end) {
    for (int64_t w = first; w < end; ++w) {
      const int64_t image = w / p.windows;
      const Sizes window = coordinates(w % p.windows, p.counts);
      const auto coordinate = [&](size_t axis, int64_t cell) {
        return p.index[image * p.index_image + p.first_index[axis] + window[axis] * p.cells[axis] + cell];
      };
      const char* base = map.view.data + image * map.view.batch * element;
      char* to = out + w * p.size * bytes;
      Sizes at(outer.size(), 0);
      do {
        int64_t offset = 0;
        bool is_pad = false;
        for (size_t a = 0; a < last; ++a) {
          const int32_t c = coordinate(a, at[a]);
          is_pad |= c < 0;
          offset += c * map.view.axis[a];
        }
        for (int64_t j = 0; j < p.cells[last]; ++j, to += bytes) {
          const int32_t c = coordinate(last, j);
          if (is_pad || c < 0) memcpy(to, pad.data(), size_t(bytes));
          else copy_row(to, base + (offset + c * map.view.axis[last]) * element, row);
        }
      } while (next(at, outer));
    }
  });
  return rows;
}

// The rows [B * windows, N, H, D] as an addressable whole.
struct Rows {
  const char* data;
  Row row;
  int64_t image;        // bytes from image to image
  Sizes window, cell;   // bytes from window to window and cell to cell on each axis
  int64_t place(const Places& p, size_t axis, int64_t e) const { return e / p.cells[axis] * window[axis] + e % p.cells[axis] * cell[axis]; }
};

Rows rows_of(const Tensor& t, const Places& p) {
  const int64_t element = size_of(dtype_of(t, kOp));
  Rows r{static_cast<const char*>(t.const_data_ptr()),
         {t.size(2), t.size(3), t.stride(2) * element, t.stride(3) * element, element},
         p.windows * t.stride(0) * element,
         Sizes(p.counts.size()),
         Sizes(p.counts.size())};
  int64_t window = t.stride(0) * element, cell = t.stride(1) * element;
  for (size_t a = p.counts.size(); a-- > 0;) {
    r.window[a] = window;
    r.cell[a] = cell;
    window *= p.counts[a];
    cell *= p.cells[a];
  }
  return r;
}

template <typename Acc, typename T>
void add_row(Acc* to, const char* from, const Row& r) {
  for (int64_t h = 0; h < r.heads; ++h, to += r.width)
    for (int64_t c = 0; c < r.width; ++c) to[c] += widened<Acc>(*reinterpret_cast<const T*>(from + h * r.head + c * r.dim));
}

// to = the sum of the rows at `offsets`, in this order, rounded once.
template <typename T>
void sum_rows(char* to, const Rows& r, const char* base, const Sizes& offsets) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t n = r.row.heads * r.row.width;
  if (offsets.empty()) {
    memset(to, 0, size_t(n) * sizeof(T));
    return;
  }
  if (offsets.size() == 1) {
    copy_row(to, base + offsets[0], r.row);
    return;
  }
  static thread_local std::vector<Acc> sum;
  sum.assign(size_t(n), Acc(0));
  for (const int64_t offset : offsets) add_row<Acc, T>(sum.data(), base + offset, r.row);
  for (int64_t i = 0; i < n; ++i) reinterpret_cast<T*>(to)[i] = narrowed<T>(sum[size_t(i)]);
}

// total [H, D] = the sum of the rows of all pads, by image, window and cell.
template <typename T>
void sum_pads(void* total, const Rows& r, const Places& p) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  torch::stable::parallel_for(0, r.row.heads, 1, [&](int64_t first, int64_t end) {
    for (int64_t h = first; h < end; ++h) {
      Row one = r.row;
      one.heads = 1;
      std::vector<double> sum(size_t(one.width), 0.0);
      for (int64_t b = 0; b < p.batch; ++b) {
        Sizes window(p.counts.size(), 0);
        do {
          Sizes cell(p.counts.size(), 0);
          do {
            int64_t offset = b * r.image + h * r.row.head;
            bool is_pad = false;
            for (size_t a = 0; a < p.counts.size(); ++a) {
              const int64_t e = window[a] * p.cells[a] + cell[a];
              is_pad |= p.index[b * p.index_image + p.first_index[a] + e] < 0;
              offset += r.place(p, a, e);
            }
            if (is_pad) add_row<double, T>(sum.data(), r.data + offset, one);
          } while (next(cell, p.cells));
        } while (next(window, p.counts));
      }
      for (int64_t c = 0; c < one.width; ++c) static_cast<Acc*>(total)[h * one.width + c] = Acc(sum[size_t(c)]);
    }
  });
}

std::tuple<Tensor, Tensor> window_sum_fwd(Tensor rows, Tensor index, Tensor owners, Sizes counts, Sizes cells, Sizes most, Sizes lengths,
                                          bool pads, std::string /*gpu*/) {
  int64_t windows = 1;
  for (const int64_t n : counts) windows *= n;
  check(rows.dim() == 4 && windows >= 1 && rows.size(0) % windows == 0, kOp, "rows must have shape [B * windows, N, H, D]");
  const Places p = prepare(rows.size(0) / windows, lengths, index, owners, counts, cells, most);
  check(rows.size(1) == p.size, kOp, "rows must have the cells of a window");
  const Rows r = rows_of(rows, p);
  const Dtype dtype = dtype_of(rows, kOp);
  const int64_t bytes = r.row.heads * r.row.width * r.row.element;
  Tensor out = new_map(lengths, {p.batch, r.row.heads, r.row.width}, dtype);
  Tensor total = new_tensor({r.row.heads, r.row.width}, dtype == Dtype::f64 ? dtype : Dtype::f32);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const size_t last = p.last();
  const Sizes outer = without_last(p.lengths), owned = without_last(p.most);
  const int64_t lines = p.tokens / p.lengths[last];
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, p.batch * lines, grain(p.lengths[last] * bytes), [&](int64_t first, int64_t end) {
      Sizes of_line, of_token;
      for (int64_t line = first; line < end; ++line) {
        const int64_t image = line / lines;
        const Sizes at = coordinates(line % lines, outer);
        const auto owner = [&](size_t a, int64_t t, int64_t o) {
          return int64_t(p.owners[image * p.owners_image + p.first_owner[a] + t * p.most[a] + o]);
        };
        of_line.clear();
        Sizes which(outer.size(), 0);
        do {
          int64_t offset = 0;
          bool found = true;
          for (size_t a = 0; a < last; ++a) {
            const int64_t e = owner(a, at[a], which[a]);
            found &= e >= 0;
            offset += r.place(p, a, e);
          }
          if (found) of_line.push_back(offset);
        } while (next(which, owned));
        for (int64_t t = 0; t < p.lengths[last]; ++t) {
          of_token.clear();
          for (const int64_t offset : of_line)
            for (int64_t o = 0; o < p.most[last]; ++o)
              if (const int64_t e = owner(last, t, o); e >= 0) of_token.push_back(offset + r.place(p, last, e));
          sum_rows<T>(to + (line * p.lengths[last] + t) * bytes, r, r.data + image * r.image, of_token);
        }
      }
    });
    memset(total.mutable_data_ptr(), 0, size_t(r.row.heads * r.row.width * size_of(dtype == Dtype::f64 ? dtype : Dtype::f32)));
    if (pads) sum_pads<T>(total.mutable_data_ptr(), r, p);
  });
  return {out, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("window_rows_fwd", TORCH_BOX(&window_rows_fwd));
  m.impl("window_rows", TORCH_BOX(&window_rows_fwd));
  m.impl("window_sum_fwd", TORCH_BOX(&window_sum_fwd));
  m.impl("window_sum", TORCH_BOX(&window_sum_fwd));
}

}  // namespace vitkern
