// The transition, one tile of one sample at a time: step, replay and its gradient. Compiled once per
// instruction set with its own namespace; uses no library code, so nothing compiled for AVX-512 can be
// linked into the baseline (see kernels.h).
#include "velocity.h"

namespace EDITR2_NS {
namespace {

using editr2::Moments;
using editr2::NormalArgs;
using editr2::ReplayArgs;
using editr2::StepArgs;

EDITR2_HD void normal_block(uint64_t seed, uint32_t step, int64_t i, F z[kVectors]) {
  const U order = L::group_counters();
  for (int n = 0; n < kVectors; n += 4) {
    // W divides the first counter of a group, so adding the order never carries into the high word.
    const uint64_t j = static_cast<uint64_t>(i + n * W) / 4;
    F group[4];
    philox_normal4<L>(order + static_cast<uint32_t>(j), L::splat(static_cast<uint32_t>(j >> 32)),
                      step, seed, group);
    L::transpose(group);
    for (int m = 0; m < 4; ++m) z[n + m] = group[m];
  }
}

void normal(const NormalArgs& a, int64_t b, int64_t tile) {
  const Range range = range_of(a.tiling, tile);
  const uint64_t seed = static_cast<uint64_t>(a.seed[b]);
  const uint32_t step = static_cast<uint32_t>(a.step[b]);
  const Target out(a.out, b, range.begin);
  for (int64_t i = range.begin; i < range.end; i += kBlock) {
    F z[kVectors];
    normal_block(seed, step, i, z);
    store(out, i - range.begin, at_most(kBlock, range.end - i), z);
  }
}

// Loads x and u and forms mu.
EDITR2_HD void mean_block(const Row& row, const Source& x_of, const Source& u_of, const Source& prev_of,
                          int64_t i, int64_t valid, F x[kVectors], F u[kVectors], F mu[kVectors]) {
  load(x_of, i, valid, x);
  load(u_of, i, valid, u);
  if (row.C == 0.0f) {
    for (int n = 0; n < kVectors; ++n) mu[n] = transition_mean(row, x[n], u[n]);
  } else {
    F prev[kVectors];
    load(prev_of, i, valid, prev);
    for (int n = 0; n < kVectors; ++n) mu[n] = transition_mean(row, x[n], u[n], prev[n]);
  }
}

enum class Noise { kNone, kGiven, kPhilox };

template <Noise kind>
double step_blocks(const StepArgs& a, const Row& row, int64_t b, Range range, const Source& u_of,
                   const Source& noise) {
  const Latents& l = a.latents;
  const Source x_of(l.x, b, range.begin), prev_of(l.m_prev, b, range.begin);
  const Target x_next(a.x_next, b, range.begin), x0(a.x0, b, range.begin);
  const uint32_t step = static_cast<uint32_t>(l.step_index[b]);
  const uint64_t seed = kind == Noise::kPhilox ? static_cast<uint64_t>(a.seed[b]) : 0;
  Sums squares;
  blocks(0, range.end - range.begin, [&](int64_t i, int64_t valid) EDITR2_INLINE {
    F eps[kVectors], x[kVectors], u[kVectors], mu[kVectors], next[kVectors], z[kVectors];
    if (kind == Noise::kPhilox) normal_block(seed, step, range.begin + i, eps);
    if (kind == Noise::kGiven) load(noise, i, valid, eps);
    mean_block(row, x_of, u_of, prev_of, i, valid, x, u, mu);
    for (int n = 0; n < kVectors; ++n) {
      next[n] = kind == Noise::kNone ? mu[n] : transition_sample(row, mu[n], eps[n]);
      z[n] = next[n] - mu[n];
    }
    store(x_next, i, valid, next);
    if (a.score_stored)
      for (int n = 0; n < kVectors; ++n) z[n] = next[n] - mu[n];
    squares.add_products(z, z, valid);
    if (x0) {
      for (int n = 0; n < kVectors; ++n) x[n] = clean_prediction(row, x[n], u[n]);
      store(x0, i, valid, x);
    }
  });
  return squares.in_order();
}

double step(const StepArgs& a, int64_t b, int64_t tile) {
  const Latents& l = a.latents;
  const Row row = row_of(l, b);
  const Range range = range_of(l.tiling, tile);
  Velocity velocity(l, row, b, range);
  const Source u = velocity.values(), noise(a.noise, b, range.begin);
  if (row.S == 0.0f) return step_blocks<Noise::kNone>(a, row, b, range, u, noise);
  if (noise) return step_blocks<Noise::kGiven>(a, row, b, range, u, noise);
  const int64_t aligned = range.begin / kBlock * kBlock;
  if (aligned == range.begin) return step_blocks<Noise::kPhilox>(a, row, b, range, u, noise);
  // Noise comes in whole blocks of the sample; rows of odd width start inside one.
  alignas(64) float staged[kTile + 2 * kBlock];
  const uint64_t seed = static_cast<uint64_t>(a.seed[b]);
  for (int64_t i = aligned; i < range.end; i += kBlock) {
    F eps[kVectors];
    normal_block(seed, static_cast<uint32_t>(l.step_index[b]), i, eps);
    store(Target(staged), i - aligned, kBlock, eps);
  }
  return step_blocks<Noise::kGiven>(a, row, b, range, u, Source(staged + (range.begin - aligned)));
}

Moments replay(const ReplayArgs& a, int64_t b, int64_t tile) {
  const Latents& l = a.latents;
  const Row row = row_of(l, b);
  const Range range = range_of(l.tiling, tile);
  Velocity velocity(l, row, b, range);
  const Source u_of = velocity.values();
  const Source x_of(l.x, b, range.begin), prev_of(l.m_prev, b, range.begin);
  const Source next_of(a.x_next, b, range.begin);
  const Source ref_of(a.v_ref, b, range.begin), old_of(a.v_old, b, range.begin);
  const float ref_factor = a.plain_ref ? 1.0f : row.B;
  Sums z_squares, ref_squares, old_squares;
  const auto add_difference = [&](const Source& from, float factor, int64_t i, int64_t valid,
                                  const F* u, Sums& squares) EDITR2_INLINE {
    F d[kVectors];
    load(from, i, valid, d);
    for (int n = 0; n < kVectors; ++n) d[n] = (u[n] - d[n]) * factor;
    squares.add_products(d, d, valid);
  };
  blocks(0, range.end - range.begin, [&](int64_t i, int64_t valid) EDITR2_INLINE {
    F x[kVectors], u[kVectors], mu[kVectors], z[kVectors];
    mean_block(row, x_of, u_of, prev_of, i, valid, x, u, mu);
    load(next_of, i, valid, z);
    for (int n = 0; n < kVectors; ++n) z[n] = z[n] - mu[n];
    z_squares.add_products(z, z, valid);
    if (ref_of) add_difference(ref_of, ref_factor, i, valid, u, ref_squares);
    if (old_of) add_difference(old_of, row.B, i, valid, u, old_squares);
  });
  return {z_squares.in_order(), ref_squares.in_order(), old_squares.in_order()};
}

// The gradient to u. Terms whose factor is 0 are not read: a clipped sample costs its reference alone.
void velocity_gradient(const BackwardArgs& a, const Row& row, int64_t b, Range range, const Source& u_of,
                       const Target& out) {
  const ReplayArgs& r = a.replay;
  const Latents& l = r.latents;
  const float on_z = a.factors[3 * b], on_ref = a.factors[3 * b + 1], on_old = a.factors[3 * b + 2];
  const Source x_of(l.x, b, range.begin), prev_of(l.m_prev, b, range.begin);
  const Source next_of(r.x_next, b, range.begin);
  const Source ref_of(r.v_ref, b, range.begin), old_of(r.v_old, b, range.begin);
  const auto add_difference = [&](const Source& from, float factor, int64_t i, int64_t valid,
                                  const F* u, F* g) EDITR2_INLINE {
    F d[kVectors];
    load(from, i, valid, d);
    for (int n = 0; n < kVectors; ++n) g[n] = g[n] + (u[n] - d[n]) * factor;
  };
  blocks(0, range.end - range.begin, [&](int64_t i, int64_t valid) EDITR2_INLINE {
    F u[kVectors], g[kVectors];
    if (on_z != 0.0f) {
      F x[kVectors], mu[kVectors];
      mean_block(row, x_of, u_of, prev_of, i, valid, x, u, mu);
      load(next_of, i, valid, g);
      for (int n = 0; n < kVectors; ++n) g[n] = (g[n] - mu[n]) * on_z;
    } else {
      load(u_of, i, valid, u);
      for (int n = 0; n < kVectors; ++n) g[n] = F{};
    }
    if (on_ref != 0.0f) add_difference(ref_of, on_ref, i, valid, u, g);
    if (on_old != 0.0f) add_difference(old_of, on_old, i, valid, u, g);
    store(out, i, valid, g);
  });
}

void backward(const BackwardArgs& a, int64_t b, int64_t tile) {
  const Latents& l = a.replay.latents;
  const Row row = row_of(l, b);
  const Range range = range_of(l.tiling, tile);
  const int64_t count = range.end - range.begin;
  const Target grad_v(a.grad_v, b, range.begin), grad_uncond(a.grad_v_uncond, b, range.begin);
  const Target grad_uncond_image(a.grad_v_uncond_image, b, range.begin);
  const float* factors = a.factors + 3 * b;
  if (factors[0] == 0.0f && factors[1] == 0.0f && factors[2] == 0.0f) {
    store_zeros(grad_v, count);
    store_zeros(grad_uncond, count);
    store_zeros(grad_uncond_image, count);
    return;
  }
  Velocity velocity(l, row, b, range);
  const Source u = velocity.values();
  if (velocity.active()) {
    alignas(64) float g[kTile];
    velocity_gradient(a, row, b, range, u, Target(g));
    velocity.backward(g, grad_v, grad_uncond, grad_uncond_image);
  } else {
    if (grad_v) velocity_gradient(a, row, b, range, u, grad_v);
    store_zeros(grad_uncond, count);
    store_zeros(grad_uncond_image, count);
  }
}

void row_squares(const Latents& l, int64_t b, int64_t tile, double* v_squares, double* w_squares) {
  const Row row = row_of(l, b);
  Velocity velocity(l, row, b, range_of(l.tiling, tile));
  if (velocity.active()) velocity.squares(v_squares, w_squares);
}

double row_dot(const BackwardArgs& a, int64_t b, int64_t tile) {
  const Latents& l = a.replay.latents;
  const float* factors = a.factors + 3 * b;
  if (factors[0] == 0.0f && factors[1] == 0.0f && factors[2] == 0.0f) return 0.0;
  const Row row = row_of(l, b);
  const Range range = range_of(l.tiling, tile);
  Velocity velocity(l, row, b, range);
  if (!velocity.active()) return 0.0;
  alignas(64) float g[kTile];
  velocity_gradient(a, row, b, range, velocity.values(), Target(g));
  return velocity.dot(g);
}

}  // namespace

editr2::NftSums nft(const editr2::NftArgs& a, int64_t b, int64_t tile);           // nft_tile.cpp
void nft_backward(const editr2::NftArgs& a, int64_t b, int64_t tile);

extern const editr2::TokenKernels token_kernels;                                  // token_chunk.cpp

extern const editr2::Kernels kernels;
const editr2::Kernels kernels = {EDITR2_NAME, normal,  step, replay,       backward,
                                 row_squares, row_dot, nft,  nft_backward, &token_kernels};

}  // namespace EDITR2_NS
