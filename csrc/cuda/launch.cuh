// The one way to start a kernel, and what the host asks of the device. Compiled as plain C++ the kernel runs in the
// emulator. Failures are std::runtime_error with the kernel's name.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "intrinsics.cuh"

namespace vitkern {

#ifdef __CUDACC__

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Runs `kernel(arguments...)` on `blocks` blocks of `threads` threads with `shared_bytes` of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            void* stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) {
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (shared_bytes > most)
      throw std::runtime_error(std::string(name) + " needs " + std::to_string(shared_bytes) +
                               " bytes of shared memory in a block, this GPU has " + std::to_string(most));
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  }
  if (shared_bytes > 16 * 1024)  // several blocks of this size are to share a multiprocessor
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared), name);
  kernel<<<dim3(uint32_t(blocks)), dim3(uint32_t(threads)), shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  check_cuda(cudaGetLastError(), name);
}

#else

inline int multiprocessors() { return emulator::kMultiprocessors; }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void*,
            const Arguments&... arguments) {
  emulator::run(name, blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

#endif

}  // namespace vitkern
