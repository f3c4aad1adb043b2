// Token matching: what a token may do, and whom it may meet. Header only, integers only; shared by the CPU and the CUDA
// kernels. The rules are those of vitkern/reference/bipartite_match.py.
#pragma once
#include <stdint.h>

#include "window.h"

namespace vitkern {

enum Role : int8_t { kSource, kDestination, kBystander, kProtected, kMasked };  // the values of Match.role

// Where partners may stand. axes 0: everywhere; 1: at most sides[0] positions away; 2: at most sides[0] rows and sides[1]
// columns away on the grid of the last tokens, which starts at grid_start.
struct MatchWindow {
  int32_t axes, sides[2], grid_start, grid_width;
};
VITKERN_HD int32_t apart(int32_t a, int32_t b) { return a < b ? b - a : a - b; }
VITKERN_HD bool in_window(const MatchWindow& w, int32_t i, int32_t j) {
  if (w.axes == 0) return true;
  if (w.axes == 1) return apart(i, j) <= w.sides[0];
  const int32_t a = i - w.grid_start, b = j - w.grid_start;
  return a >= 0 && b >= 0 && apart(a / w.grid_width, b / w.grid_width) <= w.sides[0] &&
         apart(a % w.grid_width, b % w.grid_width) <= w.sides[1];
}

}  // namespace vitkern
