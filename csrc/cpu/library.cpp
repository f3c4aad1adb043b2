// Ops about the library itself: which instruction sets there are, and the internals that tests and benchmarks measure.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <chrono>
#include <string>
#include <vector>

#include "capability.h"

namespace vitkern {

namespace {

std::string cpu_capability() { return capability(); }
std::string cpu_capabilities() { return capabilities(); }
std::string cpu_set_capability(std::string name) {
  set_capability(name);
  return capability();
}

// Runs work(t) `repeats` times on every thread and returns how many calls a second all threads made together.
template <typename Work>
double calls_per_second(int64_t repeats, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto start = std::chrono::steady_clock::now();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < repeats; ++i) work(t);
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return double(threads) * double(repeats) / took.count();
}

// Ceilings of this machine that benchmarks measure against: our own product loop and our own exp, on cached data.
double cpu_product_flops(int64_t repeats) {
  constexpr int32_t rows = 48, columns = 48, depth = 64;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<float> a(size_t(threads) * rows * depth, 0.5f), b(size_t(threads) * depth * columns, 0.25f);
  std::vector<float> c(size_t(threads) * rows * columns);
  const auto gemm = kernels().gemm_f32;
  return 2.0 * rows * columns * depth * calls_per_second(repeats, [&](int64_t t) {
           gemm(&a[size_t(t) * rows * depth], &b[size_t(t) * depth * columns], &c[size_t(t) * rows * columns], rows,
                columns, depth);
         });
}
double cpu_exps(int64_t repeats) {
  constexpr int64_t n = 2048;
  std::vector<float> x(size_t(torch::stable::get_num_threads()) * n, -1.5f), y(x.size());
  const auto exp = kernels().exp_f32;
  return double(n) * calls_per_second(repeats, [&](int64_t t) { exp(&x[size_t(t) * n], &y[size_t(t) * n], n); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("_cpu_capabilities", TORCH_BOX(&cpu_capabilities));
  m.impl("_cpu_product_flops", TORCH_BOX(&cpu_product_flops));
  m.impl("_cpu_exps", TORCH_BOX(&cpu_exps));
  m.impl("_cpu_set_capability", TORCH_BOX(&cpu_set_capability));
}

}  // namespace vitkern
