// Kernels with one fault each, for the test that the emulator finds them; built for no other purpose.
#include <exception>
#include <string>

#include "cuda_shim.h"

namespace {

constexpr int kThreads = 64;

__global__ void diverging_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void absent_thread() {
  if (threadIdx.x == 0) return;
  __syncthreads();
}

__global__ void partial_shuffle(float* out) {
  float value = 1.0f;
  if (threadIdx.x < 16) value = __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void race(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];  // no barrier before
}

__global__ void rotate(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

__global__ void unwritten_shared(float* out) {
  __shared__ float kept[kThreads];
  if (blockIdx.x == 0) kept[threadIdx.x] = 1.0f;
  out[blockIdx.x * kThreads + threadIdx.x] = kept[threadIdx.x];
}

__global__ void block_order(float* out) {
  if (threadIdx.x == 0) out[0] = out[0] * 2.0f + static_cast<float>(blockIdx.x);
}

}  // namespace

// Runs a fault; `out` has 8 * 64 floats. Returns what the emulator says, empty for nothing.
extern "C" __attribute__((visibility("default"))) const char* editr2_emulator_fault(int fault, float* out) {
  static std::string message;
  message.clear();
  try {
    if (fault == 0) EDITR2_LAUNCH(diverging_barriers, 1, kThreads, 0, nullptr);
    if (fault == 1) EDITR2_LAUNCH(absent_thread, 1, kThreads, 0, nullptr);
    if (fault == 2) EDITR2_LAUNCH(partial_shuffle, 1, kThreads, 0, nullptr, out);
    if (fault == 3) EDITR2_LAUNCH(race, 1, kThreads, 0, nullptr, out);
    if (fault == 4) EDITR2_LAUNCH(rotate, 1, kThreads, 0, nullptr, out);
    if (fault == 5) EDITR2_LAUNCH(unwritten_shared, 8, kThreads, 0, nullptr, out);
    if (fault == 6) EDITR2_LAUNCH(block_order, 8, kThreads, 0, nullptr, out);
    if (fault == 7) EDITR2_LAUNCH(rotate, 1, 2048, 0, nullptr, out);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
