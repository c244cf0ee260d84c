// What the instruction-set units (chunk.cpp, compiled once per set) offer to the common code. Plain
// data only: a unit may share no inline function with code built for another instruction set.
#pragma once

#include <cstdint>

namespace editr2 {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A sum runs over chunks of this many elements of one sample and over 32 fixed lanes inside a chunk.
// Both are constants of the result, so it does not depend on batch, threads or instruction set.
constexpr int64_t kChunk = 4096;
constexpr int kSumLanes = 32;

struct Input {  // element i of sample b is data[b * stride + i]; data may be null
  const void* data;
  int dtype;
  int64_t stride;
};

struct Output {  // contiguous [B, N]
  void* data;
  int dtype;
};

struct StepArgs {
  Input x, v, noise;
  const float* table;
  const int64_t* step_index;
  const int64_t* seed;
  Output out;
  int64_t n;
};

struct LogProbArgs {
  Input x, x_next, v, v_ref;
  const float* table;
  const int64_t* step_index;
  const float* grad_log_prob;   // backward only; null reads as zero
  const float* grad_mean_diff;  // backward only; null reads as zero
  Output grad_v;                // backward only
  int64_t n;
};

struct NormalArgs {
  const int64_t* seed;
  const int64_t* step;
  Output out;
  int64_t n;
};

struct Kernels {
  const char* name;
  void (*normal_chunk)(const NormalArgs&, int64_t b, int64_t chunk);
  double (*step_chunk)(const StepArgs&, int64_t b, int64_t chunk);  // sum of z^2
  void (*log_prob_chunk)(const LogProbArgs&, int64_t b, int64_t chunk, double* z2, double* diff2);
  void (*backward_chunk)(const LogProbArgs&, int64_t b, int64_t chunk);
};

}  // namespace editr2
