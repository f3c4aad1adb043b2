// Window geometry: which token of a map stands in which slot of which window, and in which region of a shifted map.
// Header only, integers only; shared by the CPU and the CUDA kernels. The formulas are those of
// vitkern/reference/window_attention.py.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define VITKERN_HD __host__ __device__ inline
#define VITKERN_UNROLL _Pragma("unroll")
#else
#define VITKERN_HD static inline
#define VITKERN_UNROLL
#endif

namespace vitkern {

constexpr int kMaxAxes = 4;

// One axis of the map: length L, window w, shift s, and the number of windows, ceil(L / w).
struct WindowAxis {
  int32_t length, window, shift, count;
};

// A map of 1 to 4 axes, cut into windows. Windows of an image and positions inside a window are numbered row-major.
struct WindowMap {
  WindowAxis axis[kMaxAxes];
  int32_t rank;
  int32_t roll_first;  // pad_order="roll_pad": roll the unpadded map, then pad
  int32_t size;        // slots of one window, N
  int32_t windows;     // windows of one image
};

// Coordinate of the token at working coordinate r of one axis, or -1 for a pad.
VITKERN_HD int32_t token_coordinate(const WindowAxis& a, bool roll_first, int32_t r) {
  if (roll_first) return r < a.length ? (r + a.shift) % a.length : -1;
  const int32_t padded = a.count * a.window;
  int32_t p = r + a.shift;
  if (p >= padded) p -= padded;
  return p < a.length ? p : -1;
}

// Region of working coordinate r: 0, or 1 and 2 in the last window of a shifted axis.
VITKERN_HD int32_t region_of(const WindowAxis& a, int32_t r) {
  const int32_t padded = a.count * a.window;
  if (a.shift == 0 || r < padded - a.window) return 0;
  return r < padded - a.shift ? 1 : 2;
}

// True if the window holds more than one region on some axis, so that a region mask can act inside it.
VITKERN_HD bool window_has_regions(const WindowMap& m, int32_t window) {
  for (int32_t i = m.rank - 1; i >= 0; --i) {
    const WindowAxis& a = m.axis[i];
    if (a.shift != 0 && window % a.count == a.count - 1) return true;
    window /= a.count;
  }
  return false;
}

// The slot at `position` of `window`: coordinates of its token (false for a pad) and its region code.
VITKERN_HD bool window_slot(const WindowMap& m, int32_t window, int32_t position, int32_t* coordinate, int32_t* region) {
  bool real = true;
  int32_t code = 0, place = 1;
  for (int32_t i = m.rank - 1; i >= 0; --i) {
    const WindowAxis& a = m.axis[i];
    const int32_t r = (window % a.count) * a.window + position % a.window;
    window /= a.count;
    position /= a.window;
    coordinate[i] = token_coordinate(a, m.roll_first != 0, r);
    real = real && coordinate[i] >= 0;
    code += region_of(a, r) * place;
    place *= 3;
  }
  *region = code;
  return real;
}

// A map prepared for a walk over its windows without divisions: right-aligned to four axes (those before are trivial:
// length, window and count 1), and both pad orders as one formula. With loops unrolled every index is a constant.
struct WalkAxis {
  int32_t length, window, count, shift;
  int32_t roll, period;  // token = (r + roll) mod period, with roll < period
};

struct WindowWalk {
  WalkAxis axis[kMaxAxes];
  int32_t rank;
  int32_t pads_by_r;  // a pad is where r >= length (roll_pad), else where the token is
  int32_t size, windows;
};

// A window of the batch.
struct WindowCursor {
  int32_t image;
  int32_t at[kMaxAxes];
};

VITKERN_HD WindowWalk make_walk(const WindowMap& m) {
  WindowWalk w;
  w.rank = m.rank;
  w.pads_by_r = m.roll_first;
  w.size = m.size;
  w.windows = m.windows;
  for (int32_t i = 0; i < kMaxAxes; ++i) {
    const WindowAxis trivial = {1, 1, 0, 1};
    const WindowAxis a = i < kMaxAxes - m.rank ? trivial : m.axis[i - (kMaxAxes - m.rank)];
    const int32_t period = m.roll_first ? a.length : a.count * a.window;
    const WalkAxis walk = {a.length, a.window, a.count, a.shift, period > 0 ? a.shift % period : 0, period};
    w.axis[i] = walk;
  }
  return w;
}

// The cursor at `window` of the batch, 0 <= window < images * w.windows.
VITKERN_HD WindowCursor window_cursor(const WindowWalk& w, int64_t window) {
  WindowCursor c;
  c.image = int32_t(window / w.windows);
  int32_t rest = int32_t(window % w.windows);
  VITKERN_UNROLL
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    c.at[i] = rest % w.axis[i].count;
    rest /= w.axis[i].count;
  }
  return c;
}

VITKERN_HD void next_window(const WindowWalk& w, WindowCursor* c) {
  bool carry = true;
  VITKERN_UNROLL
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    c->at[i] += carry ? 1 : 0;
    carry = c->at[i] == w.axis[i].count;
    if (carry) c->at[i] = 0;
  }
  c->image += carry ? 1 : 0;
}

// True if the window may hold pads or more than one region; false is certain.
VITKERN_HD bool window_is_special(const WindowWalk& w, const WindowCursor& c) {
  bool special = false;
  VITKERN_UNROLL
  for (int32_t i = 0; i < kMaxAxes; ++i) {
    const WalkAxis& a = w.axis[i];
    const bool pads = a.count * a.window != a.length;
    special = special || ((a.shift != 0 || pads) && c.at[i] >= a.count - (pads ? 2 : 1));
  }
  return special;
}

// The coordinates of a position inside a window, one byte per axis; every side is below 256.
VITKERN_HD uint32_t pack_position(const WindowWalk& w, int32_t position) {
  uint32_t packed = 0;
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    packed |= uint32_t(position % w.axis[i].window) << (8 * i);
    position /= w.axis[i].window;
  }
  return packed;
}

// Working coordinate of a packed position on axis i.
VITKERN_HD int32_t working_coordinate(const WindowWalk& w, const WindowCursor& c, uint32_t packed, int32_t i) {
  return c.at[i] * w.axis[i].window + int32_t((packed >> (8 * i)) & 255u);
}

// Coordinates of the token at a packed position of the window; false for a pad.
VITKERN_HD bool token_at(const WindowWalk& w, const WindowCursor& c, uint32_t packed, int32_t* coordinate) {
  bool real = true;
  coordinate[0] = coordinate[1] = 0;
  VITKERN_UNROLL
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    if (i < 2 && w.rank <= 2) continue;  // most maps have two axes
    const WalkAxis& a = w.axis[i];
    const int32_t r = working_coordinate(w, c, packed, i);
    const int32_t p = r + a.roll;
    coordinate[i] = p < a.period ? p : p - a.period;
    real = real && (w.pads_by_r ? r : coordinate[i]) < a.length;
  }
  return real;
}

// Region code of a packed position of the window, as in window_slot.
VITKERN_HD int32_t region_at(const WindowWalk& w, const WindowCursor& c, uint32_t packed) {
  int32_t code = 0;
  VITKERN_UNROLL
  for (int32_t i = 0; i < kMaxAxes; ++i) {
    const WalkAxis& a = w.axis[i];
    const int32_t r = working_coordinate(w, c, packed, i), padded = a.count * a.window;
    code = code * 3 + (a.shift == 0 || r < padded - a.window ? 0 : r < padded - a.shift ? 1 : 2);
  }
  return code;
}

}  // namespace vitkern
