// Selection of the largest scores without a sort, and their order; shared by merge_plan and select_tokens.
#pragma once
#include <stdint.h>

#include <cstring>
#include <utility>
#include <vector>

namespace vitkern {

// Unsigned numbers in the order of floats; -0 and 0 are one.
inline uint32_t ordered(float x) {
  uint32_t u;
  x += 0.0f;
  std::memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The key of the smallest of the `count` largest keys, and how many of those equal it: 8 bits at a time.
inline std::pair<uint32_t, int64_t> radix_select(const std::vector<uint32_t>& keys, int64_t count) {
  uint32_t found = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t bins[256] = {};
    for (const uint32_t key : keys)
      if ((key & known) == found) ++bins[key >> shift & 255];
    int bin = 255;
    while (bins[bin] < count) count -= bins[bin--];
    found |= uint32_t(bin) << shift;
    known |= 255u << shift;
  }
  return {found, count};
}

// The items (a key in the upper half, anything below), largest keys first, equal keys in the order given: a radix sort by
// 8 bits that skips what all keys share.
inline void sort_descending(std::vector<uint64_t>& items) {
  std::vector<uint64_t> other(items.size());
  for (int shift = 32; shift < 64; shift += 8) {
    size_t bins[257] = {};
    for (const uint64_t item : items) ++bins[256 - (item >> shift & 255)];
    if (items.empty() || bins[256 - (items[0] >> shift & 255)] == items.size()) continue;
    for (int bin = 1; bin <= 256; ++bin) bins[bin] += bins[bin - 1];
    for (const uint64_t item : items) other[bins[255 - (item >> shift & 255)]++] = item;
    items.swap(other);
  }
}

}  // namespace vitkern
