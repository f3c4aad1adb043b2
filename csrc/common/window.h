// Window geometry: which token of a map stands in which slot of which window, and in which region of a shifted map.
// Header only, integers only; shared by the CPU and the CUDA kernels. The formulas are those of
// vitkern/reference/window_attention.py.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define VITKERN_HD __host__ __device__ inline
#else
#define VITKERN_HD static inline
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

// A walk over the windows of a batch in order, without divisions; every axis index is a compile-time constant once the
// loops are unrolled. The map is right-aligned: axes below `first` are trivial (length, window and count 1).
struct WindowCursor {
  int64_t image;
  int32_t at[kMaxAxes];
};

// Moves the axes of `m` to the right end of the array; returns the first of them. Rolling before padding is dropped
// where there is nothing to pad.
VITKERN_HD int32_t align_axes(WindowMap* m) {
  const int32_t first = kMaxAxes - m->rank;
  bool padded = false;
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    const WindowAxis trivial = {1, 1, 0, 1};
    m->axis[i] = i >= first ? m->axis[i - first] : trivial;
    padded = padded || m->axis[i].length % m->axis[i].window != 0;
  }
  m->rank = kMaxAxes;
  m->roll_first = m->roll_first && padded;
  return first;
}

// The cursor at `window` of the batch, 0 <= window < images * m.windows.
VITKERN_HD WindowCursor window_cursor(const WindowMap& m, int64_t window) {
  WindowCursor c;
  c.image = window / m.windows;
  int32_t rest = int32_t(window % m.windows);
#pragma unroll
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    c.at[i] = rest % m.axis[i].count;
    rest /= m.axis[i].count;
  }
  return c;
}

VITKERN_HD void next_window(const WindowMap& m, WindowCursor* c) {
  bool carry = true;
#pragma unroll
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    c->at[i] += carry ? 1 : 0;
    carry = c->at[i] == m.axis[i].count;
    if (carry) c->at[i] = 0;
  }
  c->image += carry ? 1 : 0;
}

// True if the window may hold pads or more than one region; false is certain.
VITKERN_HD bool window_is_special(const WindowMap& m, int32_t first, const WindowCursor& c) {
  bool special = false;
#pragma unroll
  for (int32_t i = 0; i < kMaxAxes; ++i) {
    if (i < first) continue;
    const WindowAxis& a = m.axis[i];
    const bool pads = a.count * a.window != a.length;
    special = special || ((a.shift != 0 || pads) && c.at[i] >= a.count - (pads ? 2 : 1));
  }
  return special;
}

// The coordinates of a position inside a window, one byte per axis; every side is below 256.
VITKERN_HD uint32_t pack_position(const WindowMap& m, int32_t position) {
  uint32_t packed = 0;
  for (int32_t i = kMaxAxes - 1; i >= 0; --i) {
    packed |= uint32_t(position % m.axis[i].window) << (8 * i);
    position /= m.axis[i].window;
  }
  return packed;
}

// Coordinates of the token that stands at a packed position of the window; false for a pad.
VITKERN_HD bool token_at(const WindowMap& m, int32_t first, const WindowCursor& c, uint32_t packed,
                         int32_t* coordinate) {
  bool real = true;
#pragma unroll
  for (int32_t i = 0; i < kMaxAxes; ++i) {
    coordinate[i] = 0;
    if (i < first) continue;
    const WindowAxis& a = m.axis[i];
    coordinate[i] = token_coordinate(a, m.roll_first != 0, c.at[i] * a.window + int32_t((packed >> (8 * i)) & 255u));
    real = real && coordinate[i] >= 0;
  }
  return real;
}

// Region code of a packed position of the window, as in window_slot.
VITKERN_HD int32_t region_at(const WindowMap& m, const WindowCursor& c, uint32_t packed) {
  int32_t code = 0;
#pragma unroll
  for (int32_t i = 0; i < kMaxAxes; ++i) {
    const WindowAxis& a = m.axis[i];
    code = code * 3 + region_of(a, c.at[i] * a.window + int32_t((packed >> (8 * i)) & 255u));
  }
  return code;
}

}  // namespace vitkern
