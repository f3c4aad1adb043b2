// The functions of csrc/cuda/intrinsics.cuh on a CPU; their meaning is told there.
#pragma once

namespace vitkern {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };
inline unsigned char* dynamic_shared() { return emulator::block->shared.get(); }

template <class T> uint32_t round_to(float x);
template <> inline uint32_t round_to<Bf16>(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t u = __float_as_uint(x);
  return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}
template <> inline uint32_t round_to<Half>(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t u = __float_as_uint(fabsf(x)), sign = __float_as_uint(x) >> 31 << 15;
  if (fabsf(x) >= 65520.0f) return sign | 0x7C00;
  if (fabsf(x) < 6.103515625e-05f) return sign | uint32_t(rintf(fabsf(x) * 16777216.0f));  // subnormal
  return sign | (((u + 0xFFF + (u >> 13 & 1)) >> 13) - (112u << 10));
}
template <class T> float widen(uint32_t bits);
template <> inline float widen<Bf16>(uint32_t bits) { return __uint_as_float(bits << 16); }
template <> inline float widen<Half>(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 0 ? float(fraction) / 16777216.0f
            : exponent == 31 ? (fraction ? NAN : INFINITY)
                             : __uint_as_float((exponent + 112) << 23 | fraction << 13);
  return bits >> 15 & 1 ? -x : x;
}
template <class T> inline uint32_t pack2(float low, float high) { return round_to<T>(low) | round_to<T>(high) << 16; }
template <class T> inline float2 unpack2(uint32_t both) { return {widen<T>(both & 0xFFFF), widen<T>(both >> 16)}; }
struct MmaPart { float* c; const uint32_t* a; uint32_t b0, b1; };

template <class T> inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaPart mine{c, a, b0, b1};
  emulator::warp_collective("mma_16x8x16", 0xFFFFFFFFu, &mine, [](MmaPart** lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack2<T>(lanes[lane]->a[i]);
        left[g + i % 2 * 8][2 * t + i / 2 * 8] = x.x;
        left[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = x.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 x = unpack2<T>(i ? lanes[lane]->b1 : lanes[lane]->b0);
        right[2 * t + i * 8][g] = x.x;
        right[2 * t + i * 8 + 1][g] = x.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->c[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lanes[lane]->c[i] = sum;
      }
  });
}

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaPart mine{c, a, b0, b1};
  emulator::warp_collective("mma_16x8x8_tf32", 0xFFFFFFFFu, &mine, [](MmaPart** lanes) {
    const auto tf32 = [](uint32_t x) { return __uint_as_float(x & ~0x1FFFu); };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->c[i];
        for (int k = 0; k < 8; ++k) {
          const MmaPart &l = *lanes[row % 8 * 4 + k % 4], &r = *lanes[column * 4 + k % 4];
          sum += tf32(l.a[k / 4 * 2 + row / 8]) * tf32(k < 4 ? r.b0 : r.b1);
        }
        lanes[lane]->c[i] = sum;
      }
  });
}

struct MatrixPart { const uint16_t* row; uint32_t* r; };

inline void check_shared(const char* name, const void* at, uintptr_t bytes) {
  const char *p = static_cast<const char*>(at), *dynamic = reinterpret_cast<const char*>(dynamic_shared());
  const bool in_static = p >= __start_vitkern_shared && p + bytes <= __stop_vitkern_shared;
  if (!in_static && (p < dynamic || p + bytes > dynamic + emulator::block->shared_bytes))
    emulator::fail(std::string(name) + " outside the shared memory of the block");
  if (uintptr_t(p) % bytes != 0) emulator::fail(std::string(name) + " from or to an address that is not aligned");
}

inline void load_matrices(const char* name, uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(name, row, 16);
  MatrixPart mine{static_cast<const uint16_t*>(row), r};
  emulator::warp_collective(name, 0xFFFFFFFFu, &mine, [transposed](MatrixPart** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? lanes[m * 8 + j]->row[i] : lanes[m * 8 + i]->row[j];
        const uint32_t high = transposed ? lanes[m * 8 + j + 1]->row[i] : lanes[m * 8 + i]->row[j + 1];
        lanes[lane]->r[m] = low | high << 16;
      }
  });
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { load_matrices("load_matrix_x4", r, row, false); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices("load_matrix_x4_transposed", r, row, true);
}

// The target reads as NaN until the copy is waited for.
inline void copy_async(const char* name, void* shared, const void* global, uintptr_t bytes) {
  check_shared(name, shared, bytes);
  if (uintptr_t(global) % bytes != 0) emulator::fail(std::string(name) + " from an address that is not aligned");
  memset(shared, 0xFF, bytes);
  emulator::self().copies.push_back({shared, global, bytes, emulator::self().group});
}
inline void copy16_async(void* shared, const void* global) { copy_async("copy16_async", shared, global, 16); }
inline void copy4_async(void* shared, const void* global) { copy_async("copy4_async", shared, global, 4); }
inline void copy_commit() { ++emulator::self().group; }
inline void land_copies(int groups) {
  std::vector<emulator::Copy> later;
  for (const emulator::Copy& c : emulator::self().copies) {
    if (c.group < groups) memcpy(c.to, c.from, c.bytes);
    else later.push_back(c);
  }
  emulator::self().copies = later;
}
template <int kPending> inline void copy_wait() { land_copies(emulator::self().group - kPending); }
inline void copy_wait_all() { land_copies(emulator::self().group + 1); }

inline void named_barrier(int id, int threads) { emulator::barrier("named_barrier", id, threads, 0); }

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }

}  // namespace vitkern
