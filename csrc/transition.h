// The affine Gaussian transition that every sampler step is, for host and device:
//
//     mu = A x + B u (+ C m_prev)        x' = mu + S eps        log p = w mean((x' - mu)^2) + c
//
// u is the velocity, guided where there is guidance (guidance.h); m_prev the previous step's x0, for
// second-order solvers.
//
// Products and sums round separately (no fused multiply-add): the step, its replay and its gradient
// then see the same bits of mu on every instruction set, and so does the eager reference.
#pragma once

#include "philox.h"

namespace EDITR2_NS {

struct Row {  // one fp32 table row
  float A, B, C, S, w, c, sigma, sigma_next;
};
static_assert(sizeof(Row) == 8 * sizeof(float), "a table row is eight floats");

template <class F>
EDITR2_HD F transition_mean(const Row& row, F x, F v) {
  const F ax = x * row.A;
  const F bv = v * row.B;
  return ax + bv;
}

template <class F>
EDITR2_HD F transition_mean(const Row& row, F x, F v, F previous) {
  const F first_order = transition_mean(row, x, v);
  const F cm = previous * row.C;
  return first_order + cm;
}

// The clean image this velocity points to: what the next step calls m_prev.
template <class F>
EDITR2_HD F clean_prediction(const Row& row, F x, F v) {
  const F noise = v * row.sigma;
  return x - noise;
}

template <class F>
EDITR2_HD F transition_sample(const Row& row, F mu, F eps) {
  const F noise = eps * row.S;
  return mu + noise;
}

// d/dv of [ g_lp log p + g_md mean((B (v - v_ref))^2) ] is on_z * z + on_diff * (v - v_ref).
struct GradientScale {
  float on_z, on_diff;
};
EDITR2_HD GradientScale gradient_scale(const Row& row, float g_lp, float g_md, int64_t n) {
  const double b_over_n = static_cast<double>(row.B) / static_cast<double>(n);
  const double on_z = -2.0 * row.w * b_over_n, on_diff = 2.0 * row.B * b_over_n;
  return {on_z == 0.0 ? 0.0f : static_cast<float>(on_z * g_lp),  // 0 stays 0, also times infinity
          on_diff == 0.0 ? 0.0f : static_cast<float>(on_diff * g_md)};
}

}  // namespace EDITR2_NS
