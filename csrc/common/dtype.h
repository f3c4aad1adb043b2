// The storage types of tensors, as the kernels see them.
#pragma once
#include <stdint.h>

namespace vitkern {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

}  // namespace vitkern
