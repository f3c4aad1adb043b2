// Ops about the library itself: which instruction sets there are, and the internals that tests and benchmarks measure.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "capability.h"

namespace vitkern {

namespace {

std::string cpu_capability() { return capability(); }
std::string cpu_capabilities() { return capabilities(); }
std::string cpu_set_capability(std::string name) {
  set_capability(name);
  return capability();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitkern, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("_cpu_capabilities", TORCH_BOX(&cpu_capabilities));
  m.impl("_cpu_set_capability", TORCH_BOX(&cpu_set_capability));
}

}  // namespace vitkern
