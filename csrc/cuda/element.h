// The formats of 16 bits that the attention kernels take.
#pragma once
#include <stdint.h>

namespace vitkern {

enum class Element : int32_t { bfloat16, float16 };

}  // namespace vitkern
