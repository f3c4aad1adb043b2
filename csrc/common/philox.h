// Philox-4x32-10 (Salmon et al. 2011): the random stream of dropout, the same in every back-end.
#pragma once
#include <stdint.h>

#include "window.h"

namespace vitkern {

struct PhiloxWords {
  uint32_t lane[4];
};

// Four 32-bit words from the counter (image, head, query token, key slot div 4) under the 64-bit key `seed`.
VITKERN_HD PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = uint32_t(p1);
    c2 = n2;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The smallest 32-bit word that is kept: lane * 2^-32 >= p.
VITKERN_HD uint64_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  const uint64_t floor = uint64_t(scaled);
  return floor + (double(floor) < scaled ? 1 : 0);
}

}  // namespace vitkern
