// token_log_prob, one row of logits at a time. Compiled once per instruction set, as latent_tile.cpp is.
#include "block.h"
#include "tokens.h"
#include "../softmax.h"

namespace EDITR2_NS {
namespace {

using editr2::kTile;
using editr2::TokenArgs;
using editr2::TokenGradArgs;

float inverse(double temperature) { return static_cast<float>(1.0 / temperature); }

// A NaN is passed over here and comes back through the exponents.
float largest(const Source& logits, int64_t v) {
  F high[kVectors];
  I index;
  for (int lane = 0; lane < W; ++lane) index[lane] = lane;
  for (int n = 0; n < kVectors; ++n) high[n] = F{} - __builtin_inff();
  for (int64_t i = 0; i < v; i += kBlock) {
    const int64_t valid = at_most(kBlock, v - i);
    F l[kVectors];
    load(logits, i, valid, l);
    for (int n = 0; n < kVectors; ++n) {
      const I larger = (l[n] > high[n]) & (index + n * W < static_cast<int32_t>(valid));
      high[n] = L::select(larger, l[n], high[n]);
    }
  }
  float result = -__builtin_inff();
  for (int n = 0; n < kVectors; ++n)
    for (int lane = 0; lane < W; ++lane) result = high[n][lane] > result ? high[n][lane] : result;
  return result;
}

float only(const Source& element) {
  F l[kVectors];
  load(element, 0, 1, l);
  return l[0][0];
}

void row(const TokenArgs& a, int64_t i) {
  float* lse = a.lse + 2 * i;
  const int64_t id = a.ids[i];
  if (id == a.ignore_index) {
    a.log_prob[i] = a.entropy[i] = lse[0] = lse[1] = 0.0f;
    return;
  }
  const Source logits(a.logits, i, 0);
  const float m = largest(logits, a.v), scale = inverse(a.temperature);
  double s = 0.0, w = 0.0;
  for (int64_t tile = 0; tile < a.v; tile += kTile) {
    const int64_t end = at_most(tile + kTile, a.v);
    Sums exps, products;
    for (int64_t j = tile; j < end; j += kBlock) {
      const int64_t valid = at_most(kBlock, end - j);
      F d[kVectors], e[kVectors];
      load(logits, j, valid, d);
      for (int n = 0; n < kVectors; ++n) {
        d[n] = bounded_exponent<L>((d[n] - m) * scale);
        e[n] = exp_bounded<L>(d[n]);
      }
      exps.add(e, valid);
      products.add_products(e, d, valid);
    }
    s += exps.in_order();
    w += products.in_order();
  }
  const float d = (only(Source(a.logits, i, id)) - m) * scale;
  const TokenRow result = token_row(static_cast<float>(s), static_cast<float>(w), d);
  a.log_prob[i] = result.log_prob;
  a.entropy[i] = result.entropy;
  lse[0] = m;
  lse[1] = result.log_sum;
}

void gradient_row(const TokenGradArgs& a, int64_t i) {
  const Target grad(a.grad_logits, i, 0);
  const int64_t id = a.ids[i];
  if (id == a.ignore_index) return store_zeros(grad, a.v);
  const Source logits(a.logits, i, 0);
  const float m = a.lse[2 * i], log_sum = a.lse[2 * i + 1], scale = inverse(a.temperature);
  const float on_log_prob = a.grad_log_prob != nullptr ? a.grad_log_prob[i] : 0.0f;
  const float on_entropy = a.grad_entropy != nullptr ? a.grad_entropy[i] : 0.0f;
  const float own = (only(Source(a.logits, i, id)) - m) * scale;  // before its place may be overwritten
  for (int64_t j = 0; j < a.v; j += kBlock) {
    const int64_t valid = at_most(kBlock, a.v - j);
    F g[kVectors];
    load(logits, j, valid, g);
    for (int n = 0; n < kVectors; ++n)
      g[n] = token_gradient<L>((g[n] - m) * scale, log_sum, a.entropy[i], on_log_prob, on_entropy);
    for (int n = 0; n < kVectors; ++n) g[n] = g[n] * scale;
    store(grad, j, valid, g);
  }
  const float rest = token_gradient<ScalarLanes>(own, log_sum, a.entropy[i], on_log_prob, on_entropy);
  F own_grad[kVectors] = {F{} + (on_log_prob + rest) * scale};
  store(Target(a.grad_logits, i, id), 0, 1, own_grad);
}

}  // namespace

extern const editr2::TokenKernels token_kernels;
const editr2::TokenKernels token_kernels = {row, gradient_row};

}  // namespace EDITR2_NS
