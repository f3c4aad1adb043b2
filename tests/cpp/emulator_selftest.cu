// Small kernels that hold the emulator itself to account; compiled as host C++ and called through ctypes.
#include <map>

#include "../../csrc/cuda/launch.cuh"

using namespace vitkern;

// Sums 0..n-1 through shuffles, static shared memory and a barrier.
__global__ void sum_kernel(float* out) {
  __shared__ float per_warp[32];
  float x = float(threadIdx.x);
  for (int bits = 1; bits < 32; bits *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  *out = 0.0f;
  for (uint32_t i = 0; i < blockDim.x / 32; ++i) *out += per_warp[i];
}

// What shared memory holds before anybody writes, static and dynamic.
__global__ void fresh_kernel(float* out) {
  __shared__ float fresh[1];
  out[0] = fresh[0];
  out[1] = *reinterpret_cast<float*>(dynamic_shared());
}

__global__ void vote_kernel(float* out) {
  const int lane = threadIdx.x;
  const uint32_t odd = __ballot_sync(0xFFFFFFFFu, lane & 1);
  const int any = __any_sync(0xFFFFFFFFu, lane == 7), all = __all_sync(0xFFFFFFFFu, lane < 31);
  const uint32_t sum = __reduce_add_sync(0xFFFFFFFFu, uint32_t(lane));
  const int down = __shfl_down_sync(0xFFFFFFFFu, lane, 4), some = __syncthreads_or(lane == 3);
  atomicAdd(out + 5, 1.0f);
  if (lane == 30) {
    out[0] = float(odd == 0xAAAAAAAAu);
    out[1] = float(any * 10 + all);
    out[2] = float(sum);
    out[3] = float(down);  // beyond the warp: its own
    out[4] = float(some);
  }
}

// One warp produces, one consumes, over a named barrier.
__global__ void named_barrier_kernel(float* out) {
  float* box = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < 32) box[threadIdx.x] = float(threadIdx.x);
  named_barrier(3, 64);
  if (threadIdx.x == 40) out[0] = box[31];
}

// Copies in two groups; `pending` 1 lets the second be still under way when the first is read.
__global__ void copy_kernel(const float* in, float* out) {
  float* box = reinterpret_cast<float*>(dynamic_shared());
  copy16_async(box, in);
  copy_commit();
  copy16_async(box + 4, in + 4);
  copy_commit();
  copy_wait<1>();
  out[0] = box[3];
  out[1] = box[4];  // not waited for: NaN
  copy_wait<0>();
  out[2] = box[4];
}

// c = A B with A[i][k] = i + k / 8 and B[k][j] = k - j: exact in tf32.
__global__ void tf32_kernel(float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto a_at = [](int i, int k) { return __float_as_uint(float(i) + float(k) / 8.0f); };
  const auto b_at = [](int k, int j) { return __float_as_uint(float(k - j)); };
  const uint32_t a[4] = {a_at(g, t), a_at(g + 8, t), a_at(g, t + 4), a_at(g + 8, t + 4)};
  float c[4] = {0, 0, 0, 0};
  mma_16x8x8_tf32(c, a, b_at(t, g), b_at(t + 4, g));
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = c[i];
}

__global__ void part_of_block_kernel(float*) {
  if (threadIdx.x != 9) __syncthreads();
}
__global__ void part_of_warp_kernel(float*) {
  if (threadIdx.x != 9) __syncwarp();
}
__global__ void different_barriers_kernel(float*) {
  if (threadIdx.x < 32) named_barrier(1, 64);
  else named_barrier(2, 64);
}
__global__ void unfinished_copy_kernel(const float* in) { copy16_async(dynamic_shared(), in); }
__global__ void misaligned_copy_kernel(const float* in) { copy16_async(dynamic_shared() + 4, in); }
__global__ void stray_shared_kernel(float* out) { out[0] = dynamic_shared()[blockDim.x]; }
__global__ void stray_global_kernel(const float* in, float* out) { out[0] = in[128]; }  // the tests give 128 floats
__global__ void far_copy_kernel(const float* in) { copy16_async(dynamic_shared() + 4096, in); }

// Runs a kernel by name; null, or the error.
extern "C" __attribute__((visibility("default"))) const char* selftest(const char* name, const float* in, float* out) {
  static std::string error;
  std::map<std::string, std::function<void()>> kernels;
  kernels["sum"] = [&] { launch("sum", sum_kernel, 3, 96, 0, nullptr, out); };
  kernels["fresh"] = [&] { launch("fresh", fresh_kernel, 1, 1, 16, nullptr, out); };
  kernels["vote"] = [&] { launch("vote", vote_kernel, 1, 32, 0, nullptr, out); };
  kernels["named_barrier"] = [&] { launch("named_barrier", named_barrier_kernel, 1, 64, 128, nullptr, out); };
  kernels["copy"] = [&] { launch("copy", copy_kernel, 1, 1, 32, nullptr, in, out); };
  kernels["tf32"] = [&] { launch("tf32", tf32_kernel, 1, 32, 0, nullptr, out); };
  kernels["part_of_block"] = [&] { launch("part_of_block", part_of_block_kernel, 1, 64, 0, nullptr, out); };
  kernels["part_of_warp"] = [&] { launch("part_of_warp", part_of_warp_kernel, 1, 64, 0, nullptr, out); };
  kernels["different_barriers"] = [&] { launch("different_barriers", different_barriers_kernel, 1, 64, 0, nullptr, out); };
  kernels["unfinished_copy"] = [&] { launch("unfinished_copy", unfinished_copy_kernel, 1, 1, 16, nullptr, in); };
  kernels["misaligned_copy"] = [&] { launch("misaligned_copy", misaligned_copy_kernel, 1, 1, 32, nullptr, in); };
  kernels["far_copy"] = [&] { launch("far_copy", far_copy_kernel, 1, 1, 32, nullptr, in); };
  kernels["stray_shared"] = [&] { launch("stray_shared", stray_shared_kernel, 1, 16, 16, nullptr, out); };
  kernels["stray_global"] = [&] { launch("stray_global", stray_global_kernel, 1, 1, 0, nullptr, in, out); };
  try {
    kernels.at(name)();
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
