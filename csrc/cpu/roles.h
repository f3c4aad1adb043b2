// What a token may do in matching: the values of Match.role.
#pragma once
#include <stdint.h>

namespace vitkern {

enum Role : int8_t { kSource, kDestination, kBystander, kProtected, kMasked };

}  // namespace vitkern
