// SIMD lanes for philox.h and transition.h: one bundle per instruction set, picked by the flags this
// unit is compiled with. Arithmetic uses the compiler's vector types; intrinsics appear only where
// those have no operator.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../philox.h"

namespace EDITR2_NS {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

struct SimdLanes {
  static constexpr int W = kWidth;
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));

  static EDITR2_HD I float_bits(F a) { return (I)a; }
  static EDITR2_HD F bits_float(I a) { return (F)a; }
  static EDITR2_HD F from_int(I a) { return __builtin_convertvector(a, F); }
  static EDITR2_HD F select(I condition, F yes, F no) {
    return (F)((condition & (I)yes) | (~condition & (I)no));
  }
  static EDITR2_HD U splat(uint32_t a) { return U{} + a; }

  // uint32 -> fp32 with one rounding: both halves convert exactly, so only the sum rounds.
  static EDITR2_HD F from_uint(U a) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtepu32_ps((__m512i)a);
#else
    return from_int((I)(a >> 16)) * 65536.0f + from_int((I)(a & 0xFFFFu));
#endif
  }

  static EDITR2_HD F sqrt(F a) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
    return (F)_mm_sqrt_ps((__m128)a);
#else
    for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
  }

  // 32 x 32 -> 64 bits: even and odd lanes multiply apart, then the halves are put in order.
  static EDITR2_HD void multiply(U a, uint32_t m, U& hi, U& lo) {
#if defined(__AVX512F__)
    const __m512i mm = _mm512_set1_epi32((int)m);
    const __m512i even = _mm512_mul_epu32((__m512i)a, mm);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), mm);
    lo = (U)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0);
    hi = (U)_mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xF5);
#elif defined(__AVX2__)
    const __m256i mm = _mm256_set1_epi32((int)m);
    const __m256i even = _mm256_mul_epu32((__m256i)a, mm);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), mm);
    lo = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    hi = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#elif defined(__SSE2__)
    const __m128i mm = _mm_set1_epi32((int)m);
    const __m128i even = _mm_mul_epu32((__m128i)a, mm);
    const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), mm);
    const __m128i low_half = _mm_set_epi32(0, -1, 0, -1);
    lo = (U)_mm_or_si128(_mm_and_si128(even, low_half), _mm_slli_epi64(odd, 32));
    hi = (U)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(low_half, odd));
#else
    for (int i = 0; i < W; ++i) {
      const uint64_t product = (uint64_t)a[i] * m;
      hi[i] = (uint32_t)(product >> 32);
      lo[i] = (uint32_t)product;
    }
#endif
  }

  // The counters of one group of 4 W elements, ordered so that transpose() yields memory order:
  // quarter-lane g, slot i holds counter (W / 4) i + g.
  static EDITR2_HD U group_counters() {
    U c;
    for (int lane = 0; lane < W; ++lane) c[lane] = (uint32_t)((W / 4) * (lane % 4) + lane / 4);
    return c;
  }

  // 4 x 4 transposes inside each 128-bit lane.
  static EDITR2_HD void transpose(F z[4]) {
#if defined(__AVX512F__)
    const __m512 a = _mm512_unpacklo_ps((__m512)z[0], (__m512)z[1]);
    const __m512 b = _mm512_unpackhi_ps((__m512)z[0], (__m512)z[1]);
    const __m512 c = _mm512_unpacklo_ps((__m512)z[2], (__m512)z[3]);
    const __m512 d = _mm512_unpackhi_ps((__m512)z[2], (__m512)z[3]);
    z[0] = (F)_mm512_shuffle_ps(a, c, 0x44);
    z[1] = (F)_mm512_shuffle_ps(a, c, 0xEE);
    z[2] = (F)_mm512_shuffle_ps(b, d, 0x44);
    z[3] = (F)_mm512_shuffle_ps(b, d, 0xEE);
#elif defined(__AVX2__)
    const __m256 a = _mm256_unpacklo_ps((__m256)z[0], (__m256)z[1]);
    const __m256 b = _mm256_unpackhi_ps((__m256)z[0], (__m256)z[1]);
    const __m256 c = _mm256_unpacklo_ps((__m256)z[2], (__m256)z[3]);
    const __m256 d = _mm256_unpackhi_ps((__m256)z[2], (__m256)z[3]);
    z[0] = (F)_mm256_shuffle_ps(a, c, 0x44);
    z[1] = (F)_mm256_shuffle_ps(a, c, 0xEE);
    z[2] = (F)_mm256_shuffle_ps(b, d, 0x44);
    z[3] = (F)_mm256_shuffle_ps(b, d, 0xEE);
#elif defined(__SSE2__)
    __m128 a = (__m128)z[0], b = (__m128)z[1], c = (__m128)z[2], d = (__m128)z[3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    z[0] = (F)a;
    z[1] = (F)b;
    z[2] = (F)c;
    z[3] = (F)d;
#else
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float t = z[i][j];
        z[i][j] = z[j][i];
        z[j][i] = t;
      }
#endif
  }

  template <class V>
  static EDITR2_HD V load(const void* p) {
    V a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  template <class V>
  static EDITR2_HD void store(void* p, V a) {
    std::memcpy(p, &a, sizeof a);
  }

  static EDITR2_HD F from_bfloat16(H a) { return (F)(__builtin_convertvector(a, U) << 16); }
  // Round to nearest even; NaN becomes the canonical NaN instead of carrying into infinity.
  static EDITR2_HD H to_bfloat16(F a) {
    const U bits = (U)a;
    const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const U nan = (U)(a != a);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0u), H);
  }

  static EDITR2_HD F from_float16(H a) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps((__m256i)a);
#elif defined(__F16C__)
    return (F)_mm256_cvtph_ps((__m128i)a);
#else
    // Shift exponent and mantissa into place and rescale by 2^112: exact, subnormals included.
    const U bits = __builtin_convertvector(a, U);
    const U magnitude = bits & 0x7FFFu;
    const F scaled = (F)(magnitude << 13) * 5.192296858534828e33f;  // 2^112
    const U special = (U)((I)magnitude >= 0x7C00);
    const U value = ((U)scaled & ~special) | (special & (0x7F800000u | (magnitude << 13)));
    const U quiet = (U)((I)magnitude > 0x7C00) & 0x00400000u;
    return (F)(value | quiet | ((bits & 0x8000u) << 16));
#endif
  }
  static EDITR2_HD H to_float16(F a) {
#if defined(__AVX512F__)
    return (H)_mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (H)_mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT);
#else
    const U bits = (U)a;
    const U magnitude = bits & 0x7FFFFFFFu;
    // Normal results: re-bias, then round the 13 dropped bits to even (a carry may reach infinity).
    const U odd = (magnitude >> 13) & 1u;
    const U normal = (magnitude - 0x38000000u + 0xFFFu + odd) >> 13;
    // Below 2^-14: adding 1/2 aligns the significand so that the hardware rounds at 2^-24.
    const U small = (U)((F)magnitude + 0.5f) - 0x3F000000u;
    const U is_small = (U)((I)magnitude < 0x38800000);
    const U is_large = (U)((I)magnitude >= 0x47800000);  // 2^16 and above, infinity
    const U is_nan = (U)((I)magnitude > 0x7F800000);
    U half = (normal & ~is_small) | (small & is_small);
    half = (half & ~is_large) | (is_large & 0x7C00u);
    half = (half & ~is_nan) | (is_nan & (0x7E00u | ((magnitude >> 13) & 0x3FFu)));
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), H);
#endif
  }
};

}  // namespace EDITR2_NS
