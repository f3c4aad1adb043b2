// Small kernels that hold the emulator itself to account; compiled as host C++, called from test_emulator.py.
#include <pybind11/numpy.h>

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

// One number per collective of a warp; a second block-wide vote in out[4].
__global__ void vote_kernel(float* out) {
  const int lane = threadIdx.x;
  const uint32_t odd = __ballot_sync(0xFFFFFFFFu, lane & 1);
  const int any = __any_sync(0xFFFFFFFFu, lane == 7), all = __all_sync(0xFFFFFFFFu, lane < 31);
  const uint32_t sum = __reduce_add_sync(0xFFFFFFFFu, uint32_t(lane));
  const int down = __shfl_down_sync(0xFFFFFFFFu, lane, 4), some = __syncthreads_or(lane == 3);
  const int from = __shfl_sync(0xFFFFFFFFu, lane * lane, lane / 2), across = __shfl_xor_sync(0xFFFFFFFFu, lane, 5);
  float half = 0.0f;
  if (lane < 16) half = __shfl_xor_sync(0x0000FFFFu, float(lane), 8);  // a mask that names half of the warp
  if (lane == 30) {
    out[0] = float(odd == 0xAAAAAAAAu);
    out[1] = float(any * 10 + all);
    out[2] = float(sum);
    out[3] = float(down);  // beyond the warp: its own
    out[4] = float(some);
    out[5] = float(from);
    out[6] = float(across);
  }
  if (lane == 3) out[7] = half;
}

// All threads of all blocks on the same words.
__global__ void atomic_kernel(float* out) {
  const int number = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(out, 1.0f);
  atomicMax(out + 1, float(number));
  if (atomicExch(out + 2, 1.0f) == 0.0f) atomicAdd(out + 3, 1.0f);                   // one thread only finds 0
  if (atomicCAS(out + 4, 0.0f, float(number + 1)) == 0.0f) out[5] = float(number + 1);  // one thread only swaps
}

// The order in which threads arrive: the schedule itself.
__global__ void order_kernel(float* out) {
  __shared__ int arrived;
  if (threadIdx.x == 0) arrived = 0;
  __syncthreads();
  out[atomicAdd(&arrived, 1)] = float(threadIdx.x);
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

// The same in the 16-bit format T, with k / 8 up to 15 / 8, B row-major in shared memory: exact in both formats.
// Both fragments come through load_matrix, B's transposed.
template <class T>
__global__ void mma_kernel(float* out) {
  uint16_t* a_tile = reinterpret_cast<uint16_t*>(dynamic_shared());  // [16][16]
  uint16_t* b_tile = a_tile + 256;                                  // [16 k][16 columns]
  const int lane = threadIdx.x;
  for (int e = lane; e < 256; e += 32) {
    a_tile[e] = uint16_t(pack2<T>(float(e / 16) + float(e % 16) / 8.0f, 0.0f));
    b_tile[e] = uint16_t(pack2<T>(float(e / 16 - e % 16), 0.0f));
  }
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrix_x4(a, a_tile + (lane & 15) * 16 + (lane >> 4) * 8);
  load_matrix_x4_transposed(b, b_tile + (lane & 15) * 16 + (lane >> 4) * 8);
  for (int side = 0; side < 2; ++side) {
    float c[4] = {1, 1, 1, 1};  // is added to
    mma_16x8x16<T>(c, a, b[2 * side], b[2 * side + 1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + side * 8 + lane % 4 * 2 + i % 2] = c[i];
  }
}

// out = in rounded to T and back.
template <class T>
__global__ void round_kernel(const float* in, float* out) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x) * 2;
  const float2 x = unpack2<T>(pack2<T>(in[i], in[i + 1]));
  out[i] = x.x;
  out[i + 1] = x.y;
}

// Copies of 4 bytes, waited for without a group.
__global__ void copy4_kernel(const float* in, float* out) {
  __shared__ float box[3];
  copy4_async(box + 1, in + 7);
  out[0] = box[1];  // NaN still
  copy_wait_all();
  out[1] = box[1];
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
__global__ void foreign_lane_kernel(float* out) {
  if (threadIdx.x < 16) out[0] = __shfl_sync(0x0000FFFFu, 1.0f, 20);
}
__global__ void wrong_mask_kernel(float*) { __syncwarp(0x0000FFFFu); }
__global__ void mixed_collectives_kernel(float* out) {
  if (threadIdx.x % 2) out[0] = float(__any_sync(0xFFFFFFFFu, 1));
  else out[0] = float(__all_sync(0xFFFFFFFFu, 1));
}
__global__ void mixed_barriers_kernel(float*) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads_or(1);
}
__global__ void barrier_number_kernel(float*) { named_barrier(16, 32); }
__global__ void far_copy_kernel(const float* in) { copy16_async(dynamic_shared() + 4096, in); }

using Array = pybind11::array_t<float, pybind11::array::c_style>;

// Runs a kernel by name on `input`, writes to `output`.
void run(const std::string& name, uint64_t seed, const Array& input, Array& output) {
  const float* in = input.data();
  float* out = output.mutable_data();
  const int64_t n = input.size();
  std::map<std::string, std::function<void()>> kernels;
  kernels["sum"] = [&] { launch("sum", sum_kernel, 3, 96, 0, nullptr, out); };
  kernels["fresh"] = [&] { launch("fresh", fresh_kernel, 1, 1, 16, nullptr, out); };
  kernels["vote"] = [&] { launch("vote", vote_kernel, 1, 32, 0, nullptr, out); };
  kernels["atomic"] = [&] { launch("atomic", atomic_kernel, 3, 40, 0, nullptr, out); };
  kernels["order"] = [&] { launch("order", order_kernel, 1, 96, 0, nullptr, out); };
  kernels["mma_bf16"] = [&] { launch("mma_bf16", mma_kernel<Bf16>, 1, 32, 1024, nullptr, out); };
  kernels["mma_fp16"] = [&] { launch("mma_fp16", mma_kernel<Half>, 1, 32, 1024, nullptr, out); };
  kernels["round_bf16"] = [&] { launch("round_bf16", round_kernel<Bf16>, n / 64, 32, 0, nullptr, in, out); };
  kernels["round_fp16"] = [&] { launch("round_fp16", round_kernel<Half>, n / 64, 32, 0, nullptr, in, out); };
  kernels["copy4"] = [&] { launch("copy4", copy4_kernel, 1, 1, 0, nullptr, in, out); };
  kernels["foreign_lane"] = [&] { launch("foreign_lane", foreign_lane_kernel, 1, 32, 0, nullptr, out); };
  kernels["wrong_mask"] = [&] { launch("wrong_mask", wrong_mask_kernel, 1, 32, 0, nullptr, out); };
  kernels["mixed_collectives"] = [&] { launch("mixed_collectives", mixed_collectives_kernel, 1, 32, 0, nullptr, out); };
  kernels["mixed_barriers"] = [&] { launch("mixed_barriers", mixed_barriers_kernel, 1, 64, 0, nullptr, out); };
  kernels["barrier_number"] = [&] { launch("barrier_number", barrier_number_kernel, 1, 32, 0, nullptr, out); };
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
  emulator::seed = seed;
  kernels.at(name)();
}

PYBIND11_MODULE(selftest, m) { m.def("run", run); }
