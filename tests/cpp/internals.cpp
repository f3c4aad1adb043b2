// Exposes the vector functions and the product loop of one instruction-set unit to pytest. Compiled once per width.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#define VITKERN_ISA internals
#include "../../csrc/common/window.h"
#include "../../csrc/cpu/simd.inc"
#include "../../csrc/cpu/stored.inc"
#include "../../csrc/cpu/gemm.inc"
#include "../../csrc/cpu/probes.inc"

namespace py = pybind11;
namespace unit = vitkern::internals;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// y = f(x) on arrays whose size is a multiple of the vector length.
template <typename T>
Array<T> map(void (*f)(const T*, T*, int64_t), const Array<T>& x) {
  Array<T> y(x.size());
  f(x.data(), y.mutable_data(), x.size());
  return y;
}

PYBIND11_MODULE(internals, m) {
  m.attr("lanes") = VITKERN_LANES;
  m.def("exp_f32", [](const Array<float>& x) { return map<float>(unit::exp_all<float>, x); });
  m.def("exp_f64", [](const Array<double>& x) { return map<double>(unit::exp_all<double>, x); });
  m.def("log_f32", [](const Array<float>& x) { return map<float>(unit::log_all<float>, x); });
  m.def("log_f64", [](const Array<double>& x) { return map<double>(unit::log_all<double>, x); });
  m.def("exp2_score", [](const Array<float>& x) {
    Array<float> y(x.size());
    for (py::ssize_t i = 0; i < x.size(); i += VITKERN_LANES)
      unit::vstore<float>(y.mutable_data() + i,
                                        unit::vexp2_score(unit::vload<float>(x.data() + i)));
    return y;
  });
  m.def("gemm", [](const Array<float>& a, const Array<float>& b) {
    Array<float> c({a.shape(0), b.shape(1)});
    unit::gemm_plain(a.data(), b.data(), c.mutable_data(), int(a.shape(0)), int(b.shape(1)), int(a.shape(1)));
    return c;
  });
  m.def("half_round_trip", [](const Array<float>& x) {
    Array<float> y(x.size());
    for (py::ssize_t i = 0; i < x.size(); ++i)
      y.mutable_data()[i] = unit::half_to_float(unit::float_to_half(x.data()[i]));
    return y;
  });
  m.def("bfloat_round_trip", [](const Array<float>& x) {
    Array<float> y(x.size());
    for (py::ssize_t i = 0; i < x.size(); ++i)
      y.mutable_data()[i] = unit::bfloat_to_float(unit::float_to_bfloat(x.data()[i]));
    return y;
  });
  m.def("geometry", [](std::vector<int> lengths, std::vector<int> window, std::vector<int> shift, bool roll_first) {
    vitkern::WindowMap map{};
    map.rank = int(lengths.size());
    map.roll_first = roll_first;
    map.size = map.windows = 1;
    for (int a = 0; a < map.rank; ++a) {
      const int count = (lengths[a] + window[a] - 1) / window[a];
      map.axis[a] = {lengths[a], window[a], shift[a], count};
      map.size *= window[a];
      map.windows *= count;
    }
    const vitkern::WindowWalk walk = vitkern::make_walk(map);
    vitkern::WindowCursor cursor = vitkern::window_cursor(walk, 0);
    py::list tokens, regions;
    bool same = true;  // the walk of the CUDA kernels finds the same, and what it calls plain is plain
    for (int w = 0; w < map.windows; ++w) {
      const vitkern::WindowCursor direct = vitkern::window_cursor(walk, w);
      bool plain = true;
      for (int i = 0; i < map.size; ++i) {
        int32_t c[vitkern::kMaxAxes], region, token = 0;
        const bool real = vitkern::window_slot(map, w, i, c, &region);
        for (int a = 0; a < map.rank; ++a) token = token * lengths[a] + c[a];
        tokens.append(real ? token : -1);
        regions.append(region);
        const uint32_t place = vitkern::pack_position(walk, i);
        int32_t at[vitkern::kMaxAxes], walked = 0;
        const bool there = vitkern::token_at(walk, cursor, place, at);
        for (int a = 0; a < vitkern::kMaxAxes; ++a) walked = walked * walk.axis[a].length + at[a];
        same = same && there == real && (!real || walked == token) && vitkern::region_at(walk, cursor, place) == region;
        plain = plain && real && region == 0;
      }
      for (int a = 0; a < vitkern::kMaxAxes; ++a) same = same && cursor.at[a] == direct.at[a];
      same = same && cursor.image == 0 && (plain || vitkern::window_is_special(walk, cursor));
      vitkern::next_window(walk, &cursor);
    }
    same = same && cursor.image == 1;
    return py::make_tuple(tokens, regions, same);
  });
}
