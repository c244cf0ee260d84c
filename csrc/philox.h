// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// normal deviates made from it, for host and device.
//
// Everything is a template over L, a bundle of lane types and the few operations that differ between
// them (ScalarLanes below; the SIMD bundles are in cpu/lanes.h). No step uses a fused multiply-add
// and square roots are correctly rounded, so scalar, SSE2, AVX2, AVX-512 and a device build with
// contraction off (nvcc -fmad=false) all produce the same bits.
#pragma once

#include <cstdint>

#ifndef EDITR2_NS  // one namespace per instruction set: inline functions must not merge at link time
#define EDITR2_NS editr2
#endif

#if defined(__CUDACC__)
#define EDITR2_HD __host__ __device__ __forceinline__
#else
#define EDITR2_HD inline __attribute__((always_inline))
#endif

namespace EDITR2_NS {

struct ScalarLanes {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  static EDITR2_HD I float_bits(F a) {
    union { F f; I i; } pun = {a};
    return pun.i;
  }
  static EDITR2_HD F bits_float(I a) {
    union { I i; F f; } pun = {a};
    return pun.f;
  }
  static EDITR2_HD F from_int(I a) { return static_cast<F>(a); }
  static EDITR2_HD F from_uint(U a) { return static_cast<F>(a); }  // round to nearest even
  static EDITR2_HD F sqrt(F a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
  }
  static EDITR2_HD F select(bool condition, F yes, F no) { return condition ? yes : no; }
  static EDITR2_HD void multiply(U a, uint32_t m, U& hi, U& lo) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    hi = static_cast<U>(product >> 32);
    lo = static_cast<U>(product);
  }
};

template <class L>
EDITR2_HD void philox4x32_10(typename L::U c[4], uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    typename L::U hi0, lo0, hi1, lo1;
    L::multiply(c[0], 0xD2511F53u, hi0, lo0);
    L::multiply(c[2], 0xCD9E8D57u, hi1, lo1);
    c[0] = hi1 ^ c[1] ^ k0;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ k1;
    c[3] = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// ln(u) for u in [2^-33, 1]: u = 2^e m with m in [sqrt(1/2), sqrt(2)), then the degree-11 polynomial
// of Cephes' logf in m - 1; e ln 2 is added in two parts, the first exact.
template <class L>
EDITR2_HD typename L::F log_unit(typename L::F u) {
  using F = typename L::F;
  using I = typename L::I;
  const I bits = L::float_bits(u);
  const I e = (bits - 0x3F3504F3) >> 23;
  const F f = L::bits_float(bits - (I)((typename L::U)e << 23)) - 1.0f;  // unsigned: shifts that may overflow
  const F exponent = L::from_int(e);
  const F f2 = f * f;
  F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  F tail = p * (f * f2);
  tail = tail + exponent * -2.12194440e-4f;
  tail = tail - 0.5f * f2;
  return (f + tail) + exponent * 0.693359375f;
}

// cos and sin of theta = float32((k + 1/2) pi 2^-23), -2^23 <= k < 2^23. The quadrant q in -2..2
// comes from k's bits, so q * pi/2 needs no rounding in its leading part and the reduction is exact.
template <class L>
EDITR2_HD void sincos_k(typename L::I k, typename L::F& sine, typename L::F& cosine) {
  using F = typename L::F;
  using I = typename L::I;
  const F theta = (L::from_int(k) + 0.5f) * (3.14159274f * 1.1920928955078125e-7f);
  const I q = (k + (1 << 21)) >> 22;
  const F quadrant = L::from_int(q);
  const F r = (theta - quadrant * 1.57079637f) + quadrant * 4.37113883e-8f;
  const F r2 = r * r;
  F s = r2 * -1.9515295891e-4f + 8.3321608736e-3f;
  s = s * r2 - 1.6666654611e-1f;
  s = r + r * (r2 * s);
  F c = r2 * 2.443315711809948e-5f - 1.388731625493765e-3f;
  c = c * r2 + 4.166664568298827e-2f;
  c = (1.0f - 0.5f * r2) + (r2 * r2) * c;
  const auto odd = (q & 1) != 0;
  const I flip_sine = (I)((typename L::U)(q & 2) << 30);
  const I flip_cosine = (I)((typename L::U)((q + 1) & 2) << 30);
  sine = L::bits_float(L::float_bits(L::select(odd, c, s)) ^ flip_sine);
  cosine = L::bits_float(L::float_bits(L::select(odd, s, c)) ^ flip_cosine);
}

// Box-Muller on one pair of 32-bit words.
template <class L>
EDITR2_HD void normal_pair(typename L::U a, typename L::U b, typename L::F& z0, typename L::F& z1) {
  using F = typename L::F;
  using I = typename L::I;
  const F u = L::from_uint(a) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;  // 2^-32, 2^-33
  const F radius = L::sqrt(log_unit<L>(u) * -2.0f);
  F sine, cosine;
  sincos_k<L>((I)b >> 8, sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// z[i] = normal deviate of element 4 j + i for the counters (j, step) under `seed`.
template <class L>
EDITR2_HD void philox_normal4(typename L::U j_lo, typename L::U j_hi, uint32_t step, uint64_t seed,
                              typename L::F z[4]) {
  typename L::U c[4] = {j_lo, j_hi, j_lo ^ j_lo ^ step, j_lo ^ j_lo};
  philox4x32_10<L>(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  normal_pair<L>(c[0], c[1], z[0], z[1]);
  normal_pair<L>(c[2], c[3], z[2], z[3]);
}

}  // namespace EDITR2_NS
