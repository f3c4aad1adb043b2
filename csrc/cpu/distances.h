// Squared distances between two sets of rows, as clustering and reconstruction hand them to the kernels.
#pragma once
#include <stdint.h>

#include "merge_tokens.h"

namespace vitkern {

// Rows and columns that are compared: positions in a sample of x and of y, each listed.
struct DistanceGroup {
  int64_t sample;
  const int32_t *rows, *columns;
  int32_t row_count, column_count;
  int64_t first_panel;  // of its packed columns
};

// One call. Acc below is float, or double for double rows.
struct DistanceProblem {
  RowsView x, y;  // rows, columns: [B, N, C] each
  int32_t width;
  void *packed, *norms;  // Acc [panels][C][panel] and [panels][panel]: columns and their squared norms, +inf beyond the last
};

}  // namespace vitkern
