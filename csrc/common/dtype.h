// The storage types of tensors, as the kernels see them.
#pragma once
#include <stdint.h>

namespace vitkern {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

static inline int64_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

}  // namespace vitkern
