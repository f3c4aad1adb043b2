// What pytest needs of the emulator inside a library of emulated kernels: the seed of the schedules that follow, and
// which kernels were launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "emulator.h"

PYBIND11_MODULE(emulated, m) {
  m.def("seed", [](uint64_t seed) { vitkern::emulator::seed = seed; });
  m.def("launched", [] { return std::exchange(vitkern::emulator::launched, {}); });
}
