// The losses, one sample at a time, for host and device: from a sample's moments (means over its N
// elements) to its loss and to the factors its gradient is a linear combination with. The kernels only
// take moments and form combinations; what a loss means stands here once. fp32, as in the references.
#pragma once

#include <cmath>

#include "transition.h"

namespace EDITR2_NS {

enum KlScale : int { kStep = 0, kDiffusion = 1, kMean = 2, kVelocity = 3 };

struct GrpoOptions {
  float clip_low, clip_high;  // the ratio is clipped to [1 - low, 1 + high]
  float advantage_clip;       // |A| <= this; negative: none
  float kl_weight;
  int kl_scale;               // KlScale
  bool guard;                 // GRPO-Guard's ratio normalisation
};

// d loss / d u = on_z z + on_ref (u - v_ref) + on_old (u - v_old), elementwise.
struct Factors {
  float on_z, on_ref, on_old;
};

struct GrpoSample {
  float log_prob, ratio, kl, policy;
  float log_ratio;  // log p - log p_old, before the guard
  Factors factors;
};

// What u - v_ref is multiplied with before it is squared for the moment `ref2`.
EDITR2_HD float reference_factor(const Row& row, int kl_scale) {
  return kl_scale == kVelocity ? 1.0f : row.B;
}

// A factor times the incoming gradient; 0 stays 0 whatever comes in, so that nothing leaks into a masked sample.
EDITR2_HD float scaled_factor(float factor, float scale) { return factor == 0.0f ? 0.0f : factor * scale; }

EDITR2_HD bool is_finite(float a) { return a - a == 0.0f; }

// z2 = mean z^2, ref2 = mean (reference_factor (u - v_ref))^2, read where there is a v_ref, and old2 =
// mean (B (u - v_old))^2, read with the guard. `weight` is 1 / normalizer, or 0 for a masked sample.
EDITR2_HD GrpoSample grpo_sample(const Row& row, int64_t n, float z2, float ref2, bool has_ref, float old2,
                                 float old_log_prob, float advantage, float weight,
                                 const GrpoOptions& o) {
  GrpoSample r;
  const bool noisy = row.S != 0.0f;
  const float delta = row.sigma - row.sigma_next;  // > 0
  const float twice_variance = 2.0f * row.S * row.S;
  const float scaled = row.w * z2;
  r.log_prob = scaled + row.c;
  r.log_ratio = r.log_prob - old_log_prob;
  float exponent = r.log_ratio;
  if (o.guard) exponent = noisy ? (r.log_ratio + old2 / twice_variance) * row.S : 0.0f;
  r.ratio = expf(exponent);

  float a = advantage;
  if (o.advantage_clip >= 0.0f) {
    a = a < -o.advantage_clip ? -o.advantage_clip : a;
    a = a > o.advantage_clip ? o.advantage_clip : a;
  }
  // A sample without advantage has no loss, also where its ratio overflows and 0 * inf would be NaN.
  const bool overflows = r.ratio == ScalarLanes::bits_float(0x7F800000);
  const float ratio = a == 0.0f && overflows ? 1.0f : r.ratio;
  float clipped = ratio;
  clipped = clipped < 1.0f - o.clip_low ? 1.0f - o.clip_low : clipped;
  clipped = clipped > 1.0f + o.clip_high ? 1.0f + o.clip_high : clipped;
  const float free_loss = -a * ratio, clipped_loss = -a * clipped;
  const bool free = !(free_loss < clipped_loss);  // true for NaN, which must stay visible
  float on_exponent = free ? free_loss : 0.0f;
  r.policy = free ? free_loss : clipped_loss;
  if (o.guard) {
    r.policy = r.policy / delta;
    on_exponent = on_exponent / delta * row.S;
  }

  float kl_factor = 1.0f;
  if (o.kl_scale == kStep) kl_factor = noisy ? 1.0f / twice_variance : 0.0f;
  if (o.kl_scale == kDiffusion) kl_factor = noisy ? delta / twice_variance : 0.0f;
  r.kl = has_ref ? kl_factor * ref2 : 0.0f;

  const double b = row.B, over_n = 1.0 / static_cast<double>(n);
  const double policy_weight = static_cast<double>(weight) * on_exponent;
  const double f = reference_factor(row, o.kl_scale);
  r.factors.on_z = static_cast<float>(-2.0 * row.w * b * over_n * policy_weight);
  const double on_ref = 2.0 * f * f * over_n * kl_factor * o.kl_weight * static_cast<double>(weight);
  r.factors.on_ref = has_ref ? static_cast<float>(on_ref) : 0.0f;
  r.factors.on_old =
      o.guard && noisy ? static_cast<float>(b * b * over_n * policy_weight * 2.0 / twice_variance) : 0.0f;
  if (!(weight != 0.0f)) r.factors = {0.0f, 0.0f, 0.0f};  // 0 * NaN would not be 0
  return r;
}

// Means over the samples that count; the kernels fill metrics[8] in this order.
enum GrpoMetric : int {
  kRatioMean = 0,
  kRatioMaxDeviation = 1,  // max |ratio - 1|
  kClipFractionLow = 2,    // share with ratio < 1 - clip_low
  kClipFractionHigh = 3,   // share with ratio > 1 + clip_high
  kApproxKl = 4,           // mean of (log p - log p_old)^2 / 2
  kKl = 5,                 // to the reference velocity, unweighted
  kPolicyLoss = 6,
  kNonFinite = 7,          // 1 if the loss of any sample that counts is not finite
};

struct NftOptions {
  float beta, advantage_max, ref_weight, min_weight;
};

// Moments of e -+ beta d with e = (noise - x0) - v_old and d = v - v_old: x_hat(+-) - x0 = t (e -+ beta d).
// ref_square is read where there is a v_ref.
struct NftMoments {
  float positive_abs, positive_square, negative_abs, negative_square, ref_square;
};

// d loss / d v = on_positive (e - beta d) + on_negative (e + beta d) + on_ref (v - v_ref).
struct NftSample {
  float policy, positive, negative, reference;
  float on_positive, on_negative, on_ref;
};
EDITR2_HD NftSample nft_sample(const NftMoments& m, bool has_ref, float t, float r, int64_t n, float weight,
                               const NftOptions& o) {
  NftSample s;
  const float t2 = t * t;
  const float positive_abs = t * m.positive_abs, negative_abs = t * m.negative_abs;
  const float w_positive = positive_abs < o.min_weight ? o.min_weight : positive_abs;
  const float w_negative = negative_abs < o.min_weight ? o.min_weight : negative_abs;
  s.positive = t2 * m.positive_square / w_positive;
  s.negative = t2 * m.negative_square / w_negative;
  s.policy = o.advantage_max * (r * s.positive + (1.0f - r) * s.negative) / o.beta;
  const double scale = 2.0 * o.advantage_max * t2 / static_cast<double>(n) * static_cast<double>(weight);
  s.on_positive = static_cast<float>(-scale * r / w_positive);
  s.on_negative = static_cast<float>(scale * (1.0 - r) / w_negative);
  const double on_ref = 2.0 * o.ref_weight / static_cast<double>(n) * static_cast<double>(weight);
  s.on_ref = has_ref ? static_cast<float>(on_ref) : 0.0f;
  s.reference = has_ref ? m.ref_square : 0.0f;
  if (!(weight != 0.0f)) s.on_positive = s.on_negative = s.on_ref = 0.0f;
  return s;
}

// Means over the samples that count; the kernels fill metrics[5] in this order.
enum NftMetric : int {
  kNftPolicyLoss = 0,
  kNftPositive = 1,   // mean of t^2 mean((e - beta d)^2) / w+
  kNftNegative = 2,
  kNftReference = 3,  // mean((v - v_ref)^2), unweighted
  kNftNonFinite = 4,
};

}  // namespace EDITR2_NS
