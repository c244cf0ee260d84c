// One row of softmax(logits / T), for host and device: m the largest logit, d = (logit - m) / T <= 0,
// s = sum exp(d). Everything is kept relative to m and ln s, which stays exact where logits are large.
#pragma once

#include "philox.h"

namespace EDITR2_NS {

// Not lower than -88, where exp_bounded is exactly 0: 0 times this is 0, which 0 times -infinity is not.
// NaN stays NaN.
template <class L>
EDITR2_HD typename L::F bounded_exponent(typename L::F d) {
  return L::select(d < -88.0f, typename L::F{} - 88.0f, d);
}

// a b + c; lanes that fuse the two roundings specialise it.
template <class L>
EDITR2_HD typename L::F multiply_add(typename L::F a, typename L::F b, typename L::F c) {
  return a * b + c;
}

// exp(d) for -88 <= d <= 0.4: 2^n exp(r) with |r| <= ln(2) / 2, by the polynomial of Cephes' expf; about
// 1 ulp down to the smallest normal number. n comes out of the low bits of a sum with 1.5 * 2^23, and
// n ln 2 goes in two parts. 2^n is made of n's bits, so that of n = -127, and with it exp(-88), is 0.
template <class L>
EDITR2_HD typename L::F exp_bounded(typename L::F d) {
  using F = typename L::F;
  using I = typename L::I;
  using U = typename L::U;
  const auto constant = [](float c) { return F{} + c; };
  const F shifted = multiply_add<L>(d, constant(1.44269504f), constant(12582912.0f));
  const F n = shifted - 12582912.0f;
  const F r = multiply_add<L>(n, constant(2.12194440e-4f), multiply_add<L>(n, constant(-0.693359375f), d));
  F p = multiply_add<L>(r, constant(1.9875691500e-4f), constant(1.3981999507e-3f));
  p = multiply_add<L>(p, r, constant(8.3334519073e-3f));
  p = multiply_add<L>(p, r, constant(4.1665795894e-2f));
  p = multiply_add<L>(p, r, constant(1.6666665459e-1f));
  p = multiply_add<L>(p, r, constant(5.0000001201e-1f));
  const F mantissa = multiply_add<L>(p, r * r, r) + 1.0f;
  const U exponent = (U)L::float_bits(shifted) - 0x4B400000u + 127u;
  const F power = L::bits_float((I)(exponent << 23));
  return mantissa * power;
}

struct TokenRow {
  float log_prob, entropy, log_sum;
};

// From s, w = sum exp(d) d and the token's own d. Both parts of the entropy are >= 0: no cancellation.
EDITR2_HD TokenRow token_row(float s, float w, float d) {
  TokenRow row;
  row.log_sum = log_unit<ScalarLanes>(s) + (s - s);  // NaN where s is NaN, which log_unit would hide
  row.entropy = row.log_sum - w / s;
  row.log_prob = d - row.log_sum;
  return row;
}

// What every logit's gradient has, before the division by T; the token's own logit gets grad_log_prob more.
template <class L>
EDITR2_HD typename L::F token_gradient(typename L::F d, float log_sum, float entropy,
                                       float grad_log_prob, float grad_entropy) {
  using F = typename L::F;
  const F log_p = bounded_exponent<L>(d - log_sum);
  const F p = exp_bounded<L>(log_p);
  const F factor = (log_p + entropy) * grad_entropy + grad_log_prob;
  return -(p * factor);
}

}  // namespace EDITR2_NS
