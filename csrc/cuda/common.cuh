// What every kernel here is made of: launches, 8-element loads and stores, sums over a block.
//
// One layout for all: a block of 256 threads covers a chunk of 2048 elements of one sample, 8 consecutive
// elements a thread. The dtype is a run-time value, uniform over a launch. Sums are fp32 trees of fixed
// shape, so a sample's sum depends on nothing but the sample.
//
// The same sources compile as plain C++ against tests/kernels/cuda_emulator, which therefore needs: kernels
// are no templates, __shared__ arrays stand in kernels, launches go through EDITR2_LAUNCH.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define EDITR2_LAUNCH(kernel, grid, block, shared, stream, ...)                            \
  do {                                                                                     \
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);       \
    ::editr2::gpu::check_cuda(cudaGetLastError(), "launching " #kernel);                   \
  } while (0)
#else
#include "cuda_shim.h"
#endif

#include "ops.h"

namespace editr2::gpu {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVector = 8;
constexpr int kChunk = kThreads * kVector;
constexpr int64_t kMaxGrid = INT32_MAX;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// ---- host

inline void check_cuda(cudaError_t status, const std::string& doing) {
  if (status != cudaSuccess) throw std::runtime_error("CUDA failed " + doing + ": " + cudaGetErrorString(status));
}

[[noreturn]] inline void reject(const std::string& argument, const std::string& given, const std::string& accepted) {
  throw std::invalid_argument(argument + ": got " + given + ", accepted: " + accepted);
}

inline void need(bool condition, const std::string& argument, int64_t given, const std::string& accepted) {
  if (!condition) reject(argument, std::to_string(given), accepted);
}

inline void need_pointer(const void* p, const std::string& argument) {
  if (p == nullptr) reject(argument, "0", "the address of a tensor");
}

class DeviceGuard {  // makes a device current and restores the caller's
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "asking for the current device");
    if (device == before_) return;
    check_cuda(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_of(int64_t blocks) {
  need(blocks <= kMaxGrid, "B * N", blocks, "at most 2^31 - 1 blocks of " + std::to_string(kChunk) + " elements");
  return static_cast<unsigned>(blocks);
}

inline void check_sizes(int64_t batch, int64_t n) {
  need(batch >= 0, "B", batch, "a size >= 0");
  need(n >= 0, "N", n, "a size >= 0");
  need(n == 0 || batch <= INT64_MAX / 64 / n, "B", batch, "a batch whose bytes fit 63 bits");
}

inline bool is_wide(const Rows& t) {  // every row starts on 16 bytes
  const int64_t size = t.dtype == kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride * size % 16 == 0;
}

// A tensor as kernels take it; `needed` is whether it must be there.
struct Lanes {
  void* data;
  int64_t stride;
  int dtype;
  bool wide;  // 16-byte accesses are allowed at multiples of 8 elements
};
inline Lanes lanes_of(const Rows& t, bool needed, const std::string& name) {
  if (needed) need_pointer(t.data, name);
  need(t.dtype >= kFloat32 && t.dtype <= kFloat16, name + " dtype", t.dtype,
       "0 (float32), 1 (bfloat16) or 2 (float16)");
  need(t.stride >= 0, name + " stride", t.stride, "a stride >= 0");
  return {t.data, t.stride, t.dtype, is_wide(t)};
}

// ---- device

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ __forceinline__ float from_bfloat16(uint32_t bits) {
  return ScalarLanes::bits_float(static_cast<int32_t>(bits << 16));
}
#if defined(__CUDACC__)
__device__ __forceinline__ float from_float16(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}
__device__ __forceinline__ uint32_t to_float16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint32_t to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// One 16-byte store. nvcc 13.0 takes the assignment of a uint4 or float4 apart for compute_80 and compute_90, already
// in the PTX: four 4-byte stores, and so many times the transactions of a warp. It leaves an asm whole.
__device__ __forceinline__ void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
#else
using editr2_emulator::from_float16;
using editr2_emulator::store16;
using editr2_emulator::to_bfloat16;
using editr2_emulator::to_float16;
#endif

__device__ __forceinline__ uint32_t word_of(float value) {
  return static_cast<uint32_t>(ScalarLanes::float_bits(value));
}

__device__ __forceinline__ float from_half(uint32_t bits, int dtype) {
  return dtype == kBfloat16 ? from_bfloat16(bits) : from_float16(bits);
}
__device__ __forceinline__ uint32_t to_half(float value, int dtype) {
  return dtype == kBfloat16 ? to_bfloat16(value) : to_float16(value);
}

// Elements offset .. offset + 7 of a tensor as they are stored, fp32 in eight words, the others in four; those from
// `valid` on read as 0 and are not touched. `wide`: the eight start on 16 bytes.
__device__ __forceinline__ void fetch8(const void* data, int dtype, bool wide, int64_t offset, int valid,
                                       uint32_t out[kVector]) {
  if (dtype == kFloat32) {
    const uint32_t* p = static_cast<const uint32_t*>(data) + offset;
    if (wide && valid == kVector) {
      const uint4 a = reinterpret_cast<const uint4*>(p)[0], b = reinterpret_cast<const uint4*>(p)[1];
      out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
      out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) out[k] = k < valid ? p[k] : 0u;
    }
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
  if (wide && valid == kVector) {
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
  } else {
#pragma unroll
    for (int k = 0; k < kVector / 2; ++k)
      out[k] = (2 * k < valid ? p[2 * k] : 0u) | (2 * k + 1 < valid ? static_cast<uint32_t>(p[2 * k + 1]) << 16 : 0u);
  }
}
__device__ __forceinline__ void fetch8(const Lanes& t, int64_t b, int64_t i, int valid, uint32_t out[kVector]) {
  fetch8(t.data, t.dtype, t.wide, b * t.stride + i, valid, out);
}
__device__ __forceinline__ void unpack8(const uint32_t stored[kVector], int dtype, float out[kVector]) {
  if (dtype == kFloat32) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) out[k] = ScalarLanes::bits_float(static_cast<int32_t>(stored[k]));
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) out[k] = from_half(stored[k / 2] >> (16 * (k % 2)) & 0xFFFFu, dtype);
}

// Elements offset .. offset + 7 of a tensor as fp32; those from `valid` on read as 0 and are not touched.
// `wide`: the eight start on 16 bytes.
__device__ __forceinline__ void load8(const void* data, int dtype, bool wide, int64_t offset, int valid,
                                      float out[kVector]) {
  if (dtype == kFloat32) {
    const float* p = static_cast<const float*>(data) + offset;
    if (wide && valid == kVector) {
      const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
      out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
      out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) out[k] = k < valid ? p[k] : 0.0f;
    }
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
  uint32_t pair[kVector / 2];
  if (wide && valid == kVector) {
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    pair[0] = a.x, pair[1] = a.y, pair[2] = a.z, pair[3] = a.w;
  } else {
#pragma unroll
    for (int k = 0; k < kVector / 2; ++k)
      pair[k] = (2 * k < valid ? p[2 * k] : 0u) | (2 * k + 1 < valid ? static_cast<uint32_t>(p[2 * k + 1]) << 16 : 0u);
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) out[k] = from_half(pair[k / 2] >> (16 * (k % 2)) & 0xFFFFu, dtype);
}
__device__ __forceinline__ void load8(const Lanes& t, int64_t b, int64_t i, int valid, float out[kVector]) {
  load8(t.data, t.dtype, t.wide, b * t.stride + i, valid, out);
}

// Stores the values rounded to the dtype and leaves the rounded values behind.
__device__ __forceinline__ void store8(const Lanes& t, int64_t b, int64_t i, int valid, float values[kVector]) {
  const int64_t offset = b * t.stride + i;
  if (t.dtype == kFloat32) {
    float* p = static_cast<float*>(t.data) + offset;
    if (t.wide && valid == kVector) {
#pragma unroll
      for (int k = 0; k < kVector; k += 4)
        store16(p + k, word_of(values[k]), word_of(values[k + 1]), word_of(values[k + 2]), word_of(values[k + 3]));
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (k < valid) p[k] = values[k];
    }
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(t.data) + offset;
  uint32_t bits[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    bits[k] = to_half(values[k], t.dtype);
    values[k] = from_half(bits[k], t.dtype);
  }
  if (t.wide && valid == kVector) {
    store16(p, bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (k < valid) p[k] = static_cast<uint16_t>(bits[k]);
  }
}

// The elements a thread has: i .. i + valid - 1 of sample b.
struct Span {
  int64_t b, i;
  int valid;
};
__device__ __forceinline__ Span span_of(unsigned chunks, int64_t n) {
  const unsigned b = blockIdx.x / chunks, chunk = blockIdx.x - b * chunks;
  const int64_t i = static_cast<int64_t>(chunk) * kChunk + threadIdx.x * kVector;
  const int64_t left = n - i;
  return {b, i, left >= kVector ? kVector : left > 0 ? static_cast<int>(left) : 0};
}

// Standard normals of elements i .. i + 7, i a multiple of 8.
__device__ __forceinline__ void normal8(uint64_t seed, uint32_t step, int64_t i, float z[kVector]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t j = static_cast<uint64_t>(i) / 4 + half;
    philox_normal4<ScalarLanes>(static_cast<uint32_t>(j), static_cast<uint32_t>(j >> 32), step, seed, z + 4 * half);
  }
}

__device__ __forceinline__ float sum8(const float a[kVector]) {
  return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
}

// Sum over `lanes` (a power of two) neighbouring lanes; every lane has the same bits of it.
template <class T>
__device__ __forceinline__ T lanes_sum(T value, int lanes = kWarp) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// out[m] = the block's sum of values[m]; `shared` holds count * kWarps floats.
template <int count>
__device__ __forceinline__ void block_sums(const float values[count], float* shared, float* out) {
#pragma unroll
  for (int m = 0; m < count; ++m) {
    const float sum = lanes_sum(values[m]);
    if (lane_of() == 0) shared[m * kWarps + warp_of()] = sum;
  }
  __syncthreads();
  if (threadIdx.x < count) {
    const float* a = shared + threadIdx.x * kWarps;
    out[threadIdx.x] = sum8(a);
  }
}
static_assert(kWarps == kVector, "block_sums adds one value a warp with sum8");

// Mean over a sample of moment m, from its chunks' partial sums [B, chunks, moments], by one warp.
__device__ __forceinline__ float sample_mean(const float* partials, int64_t b, unsigned chunks, int moments, int m,
                                             int64_t n) {
  double sum = 0.0;
  for (unsigned c = lane_of(); c < chunks; c += kWarp) sum += partials[(b * chunks + c) * moments + m];
  return static_cast<float>(lanes_sum(sum) / static_cast<double>(n));
}

constexpr int kMaxMoments = 5;

__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }  // NaN wins

// Over the threads of a block; every thread has the result. `shared` holds kWarps doubles.
template <class Join>
__device__ __forceinline__ double block_join(double value, double* shared, Join join) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(kAllLanes, value, distance));
  if (lane_of() == 0) shared[warp_of()] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = join(value, shared[warp]);
  __syncthreads();
  return value;
}
__device__ inline double block_sum(double value, double* shared) {
  return block_join(value, shared, [](double a, double b) { return a + b; });
}
__device__ inline double block_max(double value, double* shared) {
  return block_join(value, shared, [](double a, double b) { return larger(a, b); });
}

__device__ inline double count_samples(const uint8_t* mask, int64_t batch, double* shared) {
  if (mask == nullptr) return static_cast<double>(batch);
  double counted = 0.0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) counted += mask[b] != 0 ? 1.0 : 0.0;
  return block_sum(counted, shared);
}

// What a sample that counts weighs in a loss.
__device__ __forceinline__ float sample_weight(float normalizer, double counted) {
  if (normalizer > 0.0f) return 1.0f / normalizer;
  return counted < 1.0 ? 1.0f : 1.0f / static_cast<float>(counted);
}

// One thread of the block writes what all of them have.
__device__ __forceinline__ void put(float* to, double value) {
  if (threadIdx.x == 0) *to = static_cast<float>(value);
}

}  // namespace editr2::gpu
