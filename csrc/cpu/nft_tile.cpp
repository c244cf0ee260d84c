// DiffusionNFT's loss, one tile of one sample at a time; compiled once per instruction set, as
// latent_tile.cpp is. With e = (noise - x0) - v_old and d = v - v_old, everything is made of
// p = e - beta d and q = e + beta d (see nft_sample in objective.h).
#include "block.h"

namespace EDITR2_NS {
namespace {

using editr2::NftArgs;

struct Sources {
  const Source x0, noise, v, old, ref;
  EDITR2_HD Sources(const NftArgs& a, int64_t b, int64_t begin)
      : x0(a.x0, b, begin), noise(a.noise, b, begin), v(a.v, b, begin), old(a.v_old, b, begin),
        ref(a.v_ref, b, begin) {}

  EDITR2_HD void load_sides(float beta, int64_t i, int64_t valid, F v_block[kVectors], F p[kVectors],
                            F q[kVectors]) const {
    F clean[kVectors], eps[kVectors], old_block[kVectors];
    load(x0, i, valid, clean);
    load(noise, i, valid, eps);
    load(v, i, valid, v_block);
    load(old, i, valid, old_block);
    for (int n = 0; n < kVectors; ++n) {
      const F target = eps[n] - clean[n];
      const F e = target - old_block[n];
      const F d = (v_block[n] - old_block[n]) * beta;
      p[n] = e - d;
      q[n] = e + d;
    }
  }
};

EDITR2_HD void add_both(const F values[kVectors], int64_t valid, Sums& absolute, Sums& squares) {
  F magnitude[kVectors];
  for (int n = 0; n < kVectors; ++n) magnitude[n] = (F)((I)values[n] & 0x7FFFFFFF);
  absolute.add(magnitude, valid);
  squares.add_products(values, values, valid);
}

}  // namespace

editr2::NftSums nft(const NftArgs& a, int64_t b, int64_t tile) {
  const Range range = range_of(a.tiling, tile);
  const Sources from(a, b, range.begin);
  Sums p_abs, p_squares, q_abs, q_squares, ref_squares;
  blocks(0, range.end - range.begin, [&](int64_t i, int64_t valid) EDITR2_INLINE {
    F v[kVectors], p[kVectors], q[kVectors];
    from.load_sides(a.beta, i, valid, v, p, q);
    add_both(p, valid, p_abs, p_squares);
    add_both(q, valid, q_abs, q_squares);
    if (from.ref) {
      F ref[kVectors];
      load(from.ref, i, valid, ref);
      for (int n = 0; n < kVectors; ++n) ref[n] = v[n] - ref[n];
      ref_squares.add_products(ref, ref, valid);
    }
  });
  return {p_abs.in_order(), p_squares.in_order(), q_abs.in_order(), q_squares.in_order(),
          ref_squares.in_order()};
}

void nft_backward(const NftArgs& a, int64_t b, int64_t tile) {
  const Range range = range_of(a.tiling, tile);
  const float* factors = a.factors + 3 * b;
  const float on_p = factors[0], on_q = factors[1], on_ref = factors[2];
  const Target grad_v(a.grad_v, b, range.begin);
  if (on_p == 0.0f && on_q == 0.0f && on_ref == 0.0f) {
    store_zeros(grad_v, range.end - range.begin);
    return;
  }
  const Sources from(a, b, range.begin);
  blocks(0, range.end - range.begin, [&](int64_t i, int64_t valid) EDITR2_INLINE {
    F v[kVectors], p[kVectors], q[kVectors], g[kVectors];
    from.load_sides(a.beta, i, valid, v, p, q);
    for (int n = 0; n < kVectors; ++n) g[n] = F{};
    if (on_p != 0.0f)  // not evaluated where it is 0: inf * 0 is NaN
      for (int n = 0; n < kVectors; ++n) g[n] = p[n] * on_p;
    if (on_q != 0.0f)
      for (int n = 0; n < kVectors; ++n) g[n] = g[n] + q[n] * on_q;
    if (on_ref != 0.0f) {
      F ref[kVectors];
      load(from.ref, i, valid, ref);
      for (int n = 0; n < kVectors; ++n) g[n] = g[n] + (v[n] - ref[n]) * on_ref;
    }
    store(grad_v, i, valid, g);
  });
}

}  // namespace EDITR2_NS
