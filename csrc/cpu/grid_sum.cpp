// grid_sum and grid_links on the CPU: samples, heads and slices of columns side by side.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "fields.h"
#include "kernels.h"

namespace vitkern {

namespace {

using torch::stable::Tensor;

template <typename Acc>
const GridKernels& chosen() {
  if constexpr (sizeof(Acc) == 8) return kernels().grid_f64;
  else return kernels().grid_f32;
}

// `turned`: the axes of the map are exchanged, and with them the links, which transposes the mask.
FieldView map_of(const Tensor& t, bool wide, bool turned, const char* op) {
  FieldView v = field_of(t, true, wide, op);
  if (turned) std::swap(v.row, v.column);
  return v;
}
GridProblem problem_of(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& row, const Tensor& col, bool turned, const char* op) {
  GridProblem p{};
  p.a = map_of(a, true, turned, op);
  p.b = map_of(b, true, turned, op);
  p.c = map_of(c, true, turned, op);
  p.row = map_of(turned ? col : row, false, turned, op);
  p.col = map_of(turned ? row : col, false, turned, op);
  p.batch = a.size(0);
  p.rows = int32_t(a.size(1));
  p.columns = int32_t(a.size(2));
  p.heads = int32_t(a.size(3));
  p.depth = int32_t(a.size(4));
  p.width = int32_t(c.size(4));
  for (const Tensor* t : {&b, &c, &row, &col})
    check(t->size(0) == p.batch && t->size(1) == p.rows && t->size(2) == p.columns && t->size(3) == p.heads, op,
          "b, c, row and col must have the map and heads of a");
  if (turned) std::swap(p.rows, p.columns);
  check(b.size(4) == p.depth && p.depth >= 1 && p.width >= 1 && p.depth <= 1024 && p.width <= 1024, op, "b must have the width of a");
  return p;
}

// kernel(p, sample, head, slice, scratch) for all of them.
template <typename Acc>
void over_slices(const GridProblem& p, void (*kernel)(const GridProblem&, int64_t, int32_t, int32_t, void*), int64_t slices) {
  const int64_t bytes = chosen<Acc>().scratch_bytes(p);
  torch::stable::parallel_for(0, p.rows && p.columns ? p.batch * p.heads * slices : 0, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    for (int64_t t = begin; t < end; ++t)
      kernel(p, t / slices / p.heads, int32_t(t / slices % p.heads), int32_t(t % slices), scratch.data());
  });
}
template <typename Acc>
int64_t slices_of(const GridProblem& p) {
  const int64_t lanes = kernels().lanes * 4 / int64_t(sizeof(Acc));
  return (p.width + lanes - 1) / lanes;
}

Tensor grid_sum_fwd(Tensor a, Tensor b, Tensor c, Tensor row, Tensor col, bool turned, std::string /*gpu*/) {
  GridProblem p = problem_of(a, b, c, row, col, turned, "grid_sum");
  const Dtype acc = wider(p.a.dtype, p.c.dtype);
  Tensor out = new_tensor({p.batch, a.size(1), a.size(2), p.heads, p.width}, acc);
  p.out = map_of(out, true, turned, "grid_sum");
  if (acc == Dtype::f64) over_slices<double>(p, chosen<double>().forward, slices_of<double>(p));
  else over_slices<float>(p, chosen<float>().forward, slices_of<float>(p));
  return out;
}

// Gradients of the links from what the places change: each link moves all places behind it.
template <typename Acc>
std::tuple<Tensor, Tensor> links(GridProblem& p, bool turned) {
  const int64_t slices = slices_of<Acc>(p), size = p.batch * p.rows * p.columns * p.heads;
  const Dtype acc = sizeof(Acc) == 8 ? Dtype::f64 : Dtype::f32;
  std::vector<Acc> along(size_t(slices * size)), down(along.size());
  p.drow = along.data();
  p.dcol = down.data();
  over_slices<Acc>(p, chosen<Acc>().links, slices);
  const std::vector<int64_t> sizes{p.batch, turned ? p.columns : p.rows, turned ? p.rows : p.columns, p.heads};
  Tensor drow = new_tensor(sizes, acc), dcol = new_tensor(sizes, acc);
  const auto behind = [&](const std::vector<Acc>& places, const Tensor& t, int64_t side, int64_t stride) {
    const FieldView to = map_of(t, false, turned, "grid_links");
    torch::stable::parallel_for(0, side ? size / side : 0, 256, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const int64_t first = line / stride * stride * side + line % stride;
        double sum = 0;
        for (int64_t n = side - 1; n >= 0; --n) {
          const int64_t at = first + n * stride;
          for (int64_t s = 0; s < slices; ++s) sum += double(places[size_t(s * size + at)]);
          const int64_t pixel = at / p.heads % (int64_t(p.rows) * p.columns), sample = at / p.heads / (int64_t(p.rows) * p.columns);
          const int64_t place = sample * to.batch + pixel / p.columns * to.row + pixel % p.columns * to.column + at % p.heads * to.head;
          reinterpret_cast<Acc*>(to.data)[place] = n ? Acc(sum) : Acc(0);
        }
      }
    });
  };
  behind(along, turned ? dcol : drow, p.columns, p.heads);
  behind(down, turned ? drow : dcol, p.rows, int64_t(p.columns) * p.heads);
  return {drow, dcol};
}

std::tuple<Tensor, Tensor> grid_links(Tensor dout, Tensor a, Tensor b, Tensor c, Tensor row, Tensor col, bool turned, std::string /*gpu*/) {
  GridProblem p = problem_of(a, b, c, row, col, turned, "grid_links");
  p.dout = map_of(dout, true, turned, "grid_links");
  for (int64_t axis = 0; axis < 5; ++axis) check(dout.size(axis) == c.size(axis), "grid_links", "dout must have the shape of c");
  return wider(p.a.dtype, p.c.dtype) == Dtype::f64 ? links<double>(p, turned) : links<float>(p, turned);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CPU, m) {
  m.impl("grid_sum_fwd", TORCH_BOX(&grid_sum_fwd));
  m.impl("grid_sum", TORCH_BOX(&grid_sum_fwd));
  m.impl("grid_links", TORCH_BOX(&grid_links));
}

}  // namespace vitkern
