// What the private torch ops of the CUDA kernels share: the device and stream of a call, checks of plain tensors,
// registration. Plain C++ on the stable ABI. VITKERN_EMULATED builds the same ops over the emulator, for the CPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "element.h"

// VITKERN_REGISTER(CUDA or another dispatch key, m) { m.impl(...); }. The emulator's ops are of the CPU, and the library
// they belong to is named when it is linked, so that one object serves every build.
#ifdef VITKERN_EMULATED
extern const char* const vitkern_emulated_library;
#define VITKERN_KEY_CUDA "CPU"
#define VITKERN_KEY_CompositeExplicitAutograd "CompositeExplicitAutograd"
#define VITKERN_REGISTER(key, m)                                                                                   \
  static void register_##key(torch::stable::detail::StableLibrary&);                                               \
  static const torch::stable::detail::StableTorchLibraryInit registered_##key(                                     \
      torch::stable::detail::StableLibrary::Kind::IMPL, &register_##key, vitkern_emulated_library, VITKERN_KEY_##key, \
      __FILE__, __LINE__);                                                                                         \
  static void register_##key(torch::stable::detail::StableLibrary& m)
#else
#define VITKERN_REGISTER(key, m) STABLE_TORCH_LIBRARY_IMPL(vitkern, key, m)
#endif

namespace vitkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// The device of a tensor as the current one, and its current stream, for the life of this object.
struct DeviceStream {
#ifdef VITKERN_EMULATED
  explicit DeviceStream(const Tensor&) {}
#else
  explicit DeviceStream(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0,
                    "vitkern: torch has no current CUDA stream");
  }
  torch::stable::accelerator::DeviceGuard guard;
#endif
  void* stream = nullptr;
};

// The format of the elements of q, in an error the name of its op.
inline Element element_of(const Tensor& q, const char* op) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": the CUDA kernel takes bfloat16 and float16");
  return type == ScalarType::BFloat16 ? Element::bfloat16 : Element::float16;
}

// The data of a contiguous tensor of the given type and number of elements, or null where there is none.
template <class T = void>
T* plain(const MaybeTensor& x, ScalarType type, int64_t count, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->is_contiguous() && x->numel() == count, "vitkern: ", name,
                  " must be contiguous, of the expected dtype and of ", count, " elements");
  return static_cast<T*>(x->data_ptr());
}

}  // namespace vitkern
