// The replay of a step: z = x' - mu, and the gradient to the velocity made from it.
#pragma once

#include "latents.cuh"

namespace editr2::gpu {

struct ReplayView {
  LatentsView latents;
  Lanes x_next, v_ref, v_old;
};

struct FactorsView {  // a sample's three factors are factors[B, 3] times scale[1], where there is one
  const float *factors, *scale;
};
__device__ __forceinline__ Factors factors_at(const FactorsView& in, int64_t b) {
  const float* f = in.factors + 3 * b;
  const float scale = in.scale == nullptr ? 1.0f : *in.scale;
  return {scaled_factor(f[0], scale), scaled_factor(f[1], scale), scaled_factor(f[2], scale)};
}
__device__ __forceinline__ bool all_zero(const Factors& f) {
  return f.on_z == 0.0f && f.on_ref == 0.0f && f.on_old == 0.0f;
}

// z = x' - mu.
__device__ __forceinline__ void residual8(const ReplayView& a, const Sample& s, const Span& at, bool wide,
                                          const float u[kVector], float z[kVector]) {
  const Lanes &x = a.latents.x, &x_next = a.x_next;
  float mu[kVector];
  load8(x.data, x.dtype, wide && x.wide, at.b * x.stride + at.i, at.valid, z);
  mean8(a.latents, s, at, wide, z, u, mu);
  load8(x_next.data, x_next.dtype, wide && x_next.wide, at.b * x_next.stride + at.i, at.valid, z);
#pragma unroll
  for (int k = 0; k < kVector; ++k) z[k] = z[k] - mu[k];
}

// g += factor (u - other); not evaluated where the factor is 0.
__device__ __forceinline__ void pull8(const Lanes& other, float factor, const Span& at, bool wide,
                                      const float u[kVector], float g[kVector]) {
  if (other.data == nullptr || factor == 0.0f) return;
  float v[kVector];
  load8(other.data, other.dtype, wide && other.wide, at.b * other.stride + at.i, at.valid, v);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float difference = u[k] - v[k];
    g[k] = g[k] + difference * factor;
  }
}

// The gradient to the guided velocity u. A term whose factor is 0 is neither read nor evaluated: inf * 0 is NaN.
__device__ __forceinline__ void gradient8(const ReplayView& a, const Sample& s, const Factors& f, const Span& at,
                                          bool wide, const float u[kVector], float g[kVector]) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) g[k] = 0.0f;
  if (f.on_z != 0.0f) {
    residual8(a, s, at, wide, u, g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) g[k] = g[k] * f.on_z;
  }
  pull8(a.v_ref, f.on_ref, at, wide, u, g);
  pull8(a.v_old, f.on_old, at, wide, u, g);
}

// Fills the dots of the row scales, which the gradients through renormalisation need.
void fill_row_dots(const ReplayView& replay, const FactorsView& factors, const Workspace& scratch, int64_t batch,
                   const Target& target);

}  // namespace editr2::gpu
