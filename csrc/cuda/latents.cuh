// The latents of one call on the device: the sample's table row, its guided velocity (guidance.h), the
// transition's mean, and the gradient to the velocity.
#pragma once

#include "common.cuh"
#include "workspace.cuh"

namespace editr2::gpu {

struct LatentsView {
  Lanes x, v, m_prev, v_uncond, v_uncond_image;
  const float* guidance;
  const float* table;
  const int64_t* step_index;
  int64_t rows, n;
  RowScale* scales;  // [B, rows_per_sample]; null: no renormalisation
  uint32_t width, rows_per_sample;
  int renorm;
  unsigned chunks;
};

struct Sample {
  Row row;
  Guide guide;
  const RowScale* scales;  // of this sample; null where nothing is renormalised
};

// A sample whose step is no row of the table, or that lacks the m_prev its row asks for, has a row of NaN.
__device__ __forceinline__ Sample sample_at(const LatentsView& a, int64_t b) {
  Sample s;
  const int64_t index = a.step_index[b];
  const float nan = ScalarLanes::bits_float(0x7FC00000);
  s.row = {nan, nan, nan, nan, nan, nan, nan, nan};
  if (index >= 0 && index < a.rows) {
    const float* p = a.table + 8 * index;
    // No branch: the others would be loaded only after C has come.
    const int32_t poison = a.m_prev.data != nullptr || p[2] == 0.0f ? 0 : 0x7FC00000;
    const auto entry = [p, poison](int k) { return ScalarLanes::bits_float(ScalarLanes::float_bits(p[k]) | poison); };
    s.row = {entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7)};
  }
  s.guide = guide_at(a.guidance == nullptr ? nullptr : a.guidance + 4 * b, s.row.sigma);
  if (a.v_uncond.data == nullptr) s.guide.text = 1.0f;  // a branch that is not there does not guide
  if (a.v_uncond_image.data == nullptr) s.guide.image = 1.0f;
  s.guide.active = s.guide.text != 1.0f || s.guide.image != 1.0f;
  s.scales = s.guide.active && a.scales != nullptr ? a.scales + b * a.rows_per_sample : nullptr;
  return s;
}

// The rows that consecutive elements lie in.
struct RowCursor {
  const RowScale* at;
  uint32_t left, width;
  RowScale scale;
  __device__ __forceinline__ RowCursor(const Sample& s, int64_t i, uint32_t width_) : width(width_) {
    const uint32_t row = static_cast<uint32_t>(i) / width;
    at = s.scales + row;
    left = (row + 1) * width - static_cast<uint32_t>(i);
    scale = *at;
  }
  __device__ __forceinline__ void next(bool more) {
    if (--left == 0 && more) {
      scale = *++at;
      left = width;
    }
  }
};

// v as predicted, w the vector that renormalisation scales, u the velocity of the transition.
struct Velocity {
  float v[kVector], w[kVector], u[kVector];
};

__device__ __forceinline__ void scale8(const LatentsView& a, const Sample& s, const Span& at, float u[kVector]) {
  if (s.scales == nullptr) return;
  if (a.width % kVector == 0) {  // the eight lie in one row
    const float scale = s.scales[static_cast<uint32_t>(at.i) / a.width].s;
#pragma unroll
    for (int k = 0; k < kVector; ++k) u[k] = u[k] * scale;
    return;
  }
  RowCursor cursor(s, at.i, a.width);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    u[k] = u[k] * cursor.scale.s;
    cursor.next(k + 1 < at.valid);
  }
}

__device__ __forceinline__ void guide8(const Lanes& base, float weight, const Span& at, bool wide, float u[kVector]) {
  if (weight == 1.0f) return;
  float from[kVector];
  load8(base.data, base.dtype, wide && base.wide, at.b * base.stride + at.i, at.valid, from);
#pragma unroll
  for (int k = 0; k < kVector; ++k) u[k] = guided(from[k], u[k], weight);
}

// From q.v. `wide`: at.i is a multiple of 8.
__device__ __forceinline__ void guide_velocity8(const LatentsView& a, const Sample& s, const Span& at, bool wide,
                                                Velocity& q) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) q.u[k] = q.v[k];
  guide8(a.v_uncond, s.guide.text, at, wide, q.u);
#pragma unroll
  for (int k = 0; k < kVector; ++k) q.w[k] = q.u[k];
  if (a.renorm == kTextChannel) scale8(a, s, at, q.u);
  guide8(a.v_uncond_image, s.guide.image, at, wide, q.u);
  if (a.renorm == kTextChannel) return;
#pragma unroll
  for (int k = 0; k < kVector; ++k) q.w[k] = q.u[k];
  scale8(a, s, at, q.u);
}

__device__ __forceinline__ void velocity8(const LatentsView& a, const Sample& s, const Span& at, bool wide,
                                          Velocity& q) {
  load8(a.v.data, a.v.dtype, wide && a.v.wide, at.b * a.v.stride + at.i, at.valid, q.v);
  guide_velocity8(a, s, at, wide, q);
}

__device__ __forceinline__ void mean8(const LatentsView& a, const Sample& s, const Span& at, bool wide,
                                      const float x[kVector], const float u[kVector], float mu[kVector]) {
  if (a.m_prev.data == nullptr || s.row.C == 0.0f) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) mu[k] = transition_mean(s.row, x[k], u[k]);
    return;
  }
  float previous[kVector];
  load8(a.m_prev.data, a.m_prev.dtype, wide && a.m_prev.wide, at.b * a.m_prev.stride + at.i, at.valid, previous);
#pragma unroll
  for (int k = 0; k < kVector; ++k) mu[k] = transition_mean(s.row, x[k], u[k], previous[k]);
}

// ---- host

// Checks a call's latents, divides its workspace and fills the row scales where there is renormalisation.
LatentsView prepare(const Latents& latents, void* workspace, int64_t batch, const Target& target, Workspace& scratch);

// From partial sums [B, chunks, count] of z^2 and (B (u - v_ref))^2; either output may be null.
void finish_log_prob(const LatentsView& latents, const float* partials, int count, float* log_prob, float* mean_diff,
                     int64_t batch, const Target& target);

}  // namespace editr2::gpu
