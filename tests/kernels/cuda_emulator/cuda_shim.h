// Stands in for the CUDA headers when the kernels of csrc/cuda are compiled as plain C++ (see emulator.cpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define EDITR2_EMULATED 1
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// One section for all of them, so that the emulator can fill it with NaN before every block.
#define __shared__ static __attribute__((section("editr2_shared")))

#define threadIdx (::editr2_emulator::thread_index())
#define blockIdx (::editr2_emulator::block_index())
#define blockDim (::editr2_emulator::block_size())
#define gridDim (::editr2_emulator::grid_size())

#define __syncthreads() ::editr2_emulator::barrier(__FILE__, __LINE__)
#define __syncwarp(...) ((void)::editr2_emulator::exchange(__FILE__, __LINE__, 0, 0, 0))
#define __shfl_xor_sync(mask, value, lanes) \
  ::editr2_emulator::shuffle(__FILE__, __LINE__, mask, value, 'x', static_cast<int>(lanes))
#define __shfl_down_sync(mask, value, lanes) \
  ::editr2_emulator::shuffle(__FILE__, __LINE__, mask, value, 'd', static_cast<int>(lanes))
#define __shfl_sync(mask, value, lane) \
  ::editr2_emulator::shuffle(__FILE__, __LINE__, mask, value, 'i', static_cast<int>(lane))

#define __any_sync(mask, value) \
  (::editr2_emulator::shuffle(__FILE__, __LINE__, mask, static_cast<uint64_t>((value) ? 1 : 0), 'a', 0) != 0)

#define EDITR2_LAUNCH(kernel, grid, block, shared, stream, ...)                                      \
  ::editr2_emulator::launch(#kernel, ::editr2_emulator::Dim3(grid), ::editr2_emulator::Dim3(block),  \
                            static_cast<size_t>(shared), stream, [&] { kernel(__VA_ARGS__); })

namespace editr2_emulator {

struct Dim3 {
  unsigned x, y, z;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_size();
const Dim3& grid_size();

void launch(const char* kernel, Dim3 grid, Dim3 block, size_t shared, void* stream,
            const std::function<void()>& body);
void barrier(const char* file, int line);
// Every lane of the warp gives a value and gets that of its source lane (its own where there is none); 'a': the bits
// that any lane gave.
uint64_t exchange(const char* file, int line, uint64_t bits, int kind, int lanes);
[[noreturn]] void fail(const char* file, int line, const char* what);

template <class T>
T shuffle(const char* file, int line, unsigned mask, T value, int kind, int lanes) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "what the hardware shuffles");
  if (mask != 0xFFFFFFFFu) fail(file, line, "a shuffle whose mask is not all 32 lanes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(file, line, bits, kind, lanes);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_float16(uint32_t bits) {
  const uint16_t word = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &word, sizeof half);
  return static_cast<float>(half);
}
inline uint32_t to_float16(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t word;
  std::memcpy(&word, &half, sizeof word);
  return word;
}
inline uint32_t to_bfloat16(float value) {  // to nearest even, as cvt.rn.bf16.f32
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

inline void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail(__FILE__, __LINE__, "a 16-byte store off 16 bytes");
  const uint32_t words[4] = {a, b, c, d};
  std::memcpy(to, words, sizeof words);
}

}  // namespace editr2_emulator

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

using dim3 = editr2_emulator::Dim3;
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "the emulator has no such device"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __longlong_as_double(long long a) {
  double value;
  std::memcpy(&value, &a, sizeof value);
  return value;
}
// The threads of the emulator take turns, so that any access is atomic and in order.
inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
inline void __threadfence() {}
