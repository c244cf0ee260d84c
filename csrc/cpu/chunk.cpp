// The elementwise kernels, one chunk of one sample at a time. Compiled once per instruction set with
// its own namespace; uses no library code, so nothing compiled for AVX-512 can be linked into the
// baseline (see kernels.h).
#include "kernels.h"
#include "lanes.h"
#include "../transition.h"

namespace EDITR2_NS {
namespace {

using editr2::Dtype;
using editr2::Input;
using editr2::kChunk;
using editr2::kSumLanes;
using editr2::LogProbArgs;
using editr2::NormalArgs;
using editr2::Output;
using editr2::StepArgs;

using L = SimdLanes;
using F = L::F;
using H = L::H;
using U = L::U;

constexpr int W = L::W;
constexpr int kBlock = 64;            // elements an inner iteration covers
constexpr int kVectors = kBlock / W;  // vectors in a block
constexpr int kSums = kSumLanes / W;  // vectors of running sums

EDITR2_HD int64_t size_of(int dtype) { return dtype == editr2::kFloat32 ? 4 : 2; }
EDITR2_HD int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

EDITR2_HD void load_block(const void* p, int dtype, F out[kVectors]) {
  if (dtype == editr2::kFloat32) {
    const float* f = static_cast<const float*>(p);
    for (int n = 0; n < kVectors; ++n) out[n] = L::load<F>(f + n * W);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(p);
    if (dtype == editr2::kBfloat16)
      for (int n = 0; n < kVectors; ++n) out[n] = L::from_bfloat16(L::load<H>(h + n * W));
    else
      for (int n = 0; n < kVectors; ++n) out[n] = L::from_float16(L::load<H>(h + n * W));
  }
}

// Stores values rounded to dtype and leaves the rounded values behind.
EDITR2_HD void store_block(void* p, int dtype, F values[kVectors]) {
  if (dtype == editr2::kFloat32) {
    float* f = static_cast<float*>(p);
    for (int n = 0; n < kVectors; ++n) L::store(f + n * W, values[n]);
  } else {
    uint16_t* h = static_cast<uint16_t*>(p);
    if (dtype == editr2::kBfloat16) {
      for (int n = 0; n < kVectors; ++n) {
        const H rounded = L::to_bfloat16(values[n]);
        L::store(h + n * W, rounded);
        values[n] = L::from_bfloat16(rounded);
      }
    } else {
      for (int n = 0; n < kVectors; ++n) {
        const H rounded = L::to_float16(values[n]);
        L::store(h + n * W, rounded);
        values[n] = L::from_float16(rounded);
      }
    }
  }
}

// A tail shorter than a block is computed on zero-padded copies of its inputs.
struct Padded {
  alignas(64) unsigned char bytes[kBlock * 4];
  const void* fill(const void* p, int dtype, int64_t valid) {
    __builtin_memset(bytes, 0, sizeof bytes);
    __builtin_memcpy(bytes, p, static_cast<size_t>(valid * size_of(dtype)));
    return bytes;
  }
};

EDITR2_HD const unsigned char* element(const Input& in, int64_t b, int64_t i) {
  return static_cast<const unsigned char*>(in.data) + (b * in.stride + i) * size_of(in.dtype);
}
EDITR2_HD unsigned char* element(const Output& out, int64_t b, int64_t i, int64_t n) {
  return static_cast<unsigned char*>(out.data) + (b * n + i) * size_of(out.dtype);
}

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

EDITR2_HD void add_squares(const F z[kVectors], int64_t valid, F sums[kSums]) {
  if (valid == kBlock) {
    for (int n = 0; n < kVectors; ++n) sums[n % kSums] += z[n] * z[n];
  } else {
    for (int n = 0; n < kVectors; ++n) {
      F square = z[n] * z[n];
      for (int lane = 0; lane < W; ++lane)
        if (n * W + lane >= valid) square[lane] = 0.0f;
      sums[n % kSums] += square;
    }
  }
}

EDITR2_HD double total(const F sums[kSums]) {
  double sum = 0.0;
  for (int n = 0; n < kSums; ++n)
    for (int lane = 0; lane < W; ++lane) sum += static_cast<double>(sums[n][lane]);
  return sum;
}

void normal_chunk(const NormalArgs& a, int64_t b, int64_t chunk) {
  const int64_t end = at_most((chunk + 1) * kChunk, a.n);
  const uint64_t seed = static_cast<uint64_t>(a.seed[b]);
  const uint32_t step = static_cast<uint32_t>(a.step[b]);
  for (int64_t i = chunk * kChunk; i < end; i += kBlock) {
    const int64_t valid = at_most(kBlock, end - i);
    F z[kVectors];
    normal_block(seed, step, i, z);
    unsigned char* out = element(a.out, b, i, a.n);
    if (valid == kBlock) {
      store_block(out, a.out.dtype, z);
    } else {
      Padded padded;
      store_block(padded.bytes, a.out.dtype, z);
      __builtin_memcpy(out, padded.bytes, static_cast<size_t>(valid * size_of(a.out.dtype)));
    }
  }
}

enum class Noise { kNone, kGiven, kPhilox };

template <Noise noise>
double step_rows(const StepArgs& a, int64_t b, int64_t chunk) {
  const int64_t end = at_most((chunk + 1) * kChunk, a.n);
  const int64_t index = a.step_index[b];
  const Row row = reinterpret_cast<const Row*>(a.table)[index];
  const uint32_t step = static_cast<uint32_t>(index);
  const uint64_t seed = noise == Noise::kPhilox ? static_cast<uint64_t>(a.seed[b]) : 0;
  F sums[kSums] = {};
  for (int64_t i = chunk * kChunk; i < end; i += kBlock) {
    const int64_t valid = at_most(kBlock, end - i);
    const bool whole = valid == kBlock;
    const void* px = element(a.x, b, i);
    const void* pv = element(a.v, b, i);
    const void* pe = noise == Noise::kGiven ? element(a.noise, b, i) : nullptr;
    unsigned char* out = element(a.out, b, i, a.n);
    Padded x_pad, v_pad, e_pad, out_pad;
    void* po = out;
    if (!whole) {
      px = x_pad.fill(px, a.x.dtype, valid);
      pv = v_pad.fill(pv, a.v.dtype, valid);
      if (noise == Noise::kGiven) pe = e_pad.fill(pe, a.noise.dtype, valid);
      po = out_pad.bytes;
    }
    F eps[kVectors], x[kVectors], v[kVectors], mu[kVectors], next[kVectors];
    if (noise == Noise::kPhilox) normal_block(seed, step, i, eps);
    if (noise == Noise::kGiven) load_block(pe, a.noise.dtype, eps);
    load_block(px, a.x.dtype, x);
    load_block(pv, a.v.dtype, v);
    for (int n = 0; n < kVectors; ++n) {
      mu[n] = transition_mean(row, x[n], v[n]);
      next[n] = noise == Noise::kNone ? mu[n] : transition_sample(row, mu[n], eps[n]);
    }
    store_block(po, a.out.dtype, next);
    if (!whole) __builtin_memcpy(out, po, static_cast<size_t>(valid * size_of(a.out.dtype)));
    for (int n = 0; n < kVectors; ++n) next[n] = next[n] - mu[n];
    add_squares(next, valid, sums);
  }
  return total(sums);
}

double step_chunk(const StepArgs& a, int64_t b, int64_t chunk) {
  if (reinterpret_cast<const Row*>(a.table)[a.step_index[b]].S == 0.0f)
    return step_rows<Noise::kNone>(a, b, chunk);
  if (a.noise.data != nullptr) return step_rows<Noise::kGiven>(a, b, chunk);
  return step_rows<Noise::kPhilox>(a, b, chunk);
}

// The loop that log_prob and its gradient share: body(i, valid, z, v - v_ref) for each block.
template <bool with_ref, class Body>
EDITR2_HD void replay(const LogProbArgs& a, const Row& row, int64_t b, int64_t chunk, Body body) {
  const int64_t end = at_most((chunk + 1) * kChunk, a.n);
  for (int64_t i = chunk * kChunk; i < end; i += kBlock) {
    const int64_t valid = at_most(kBlock, end - i);
    const void* px = element(a.x, b, i);
    const void* pn = element(a.x_next, b, i);
    const void* pv = element(a.v, b, i);
    const void* pr = with_ref ? element(a.v_ref, b, i) : nullptr;
    Padded x_pad, n_pad, v_pad, r_pad;
    if (valid != kBlock) {
      px = x_pad.fill(px, a.x.dtype, valid);
      pn = n_pad.fill(pn, a.x_next.dtype, valid);
      pv = v_pad.fill(pv, a.v.dtype, valid);
      if (with_ref) pr = r_pad.fill(pr, a.v_ref.dtype, valid);
    }
    F x[kVectors], v[kVectors], z[kVectors], diff[kVectors] = {};
    load_block(px, a.x.dtype, x);
    load_block(pv, a.v.dtype, v);
    load_block(pn, a.x_next.dtype, z);
    for (int n = 0; n < kVectors; ++n) z[n] = z[n] - transition_mean(row, x[n], v[n]);
    if (with_ref) {
      load_block(pr, a.v_ref.dtype, diff);
      for (int n = 0; n < kVectors; ++n) diff[n] = v[n] - diff[n];
    }
    body(i, valid, z, diff);
  }
}

template <bool with_ref>
EDITR2_HD void log_prob_rows(const LogProbArgs& a, int64_t b, int64_t chunk, double* z2,
                             double* diff2) {
  const Row row = reinterpret_cast<const Row*>(a.table)[a.step_index[b]];
  F z_sums[kSums] = {}, diff_sums[kSums] = {};
  replay<with_ref>(a, row, b, chunk, [&](int64_t, int64_t valid, F* z, F* diff) {
    add_squares(z, valid, z_sums);
    if (with_ref) {
      for (int n = 0; n < kVectors; ++n) diff[n] = diff[n] * row.B;
      add_squares(diff, valid, diff_sums);
    }
  });
  *z2 = total(z_sums);
  *diff2 = total(diff_sums);
}

void log_prob_chunk(const LogProbArgs& a, int64_t b, int64_t chunk, double* z2, double* diff2) {
  if (a.v_ref.data != nullptr)
    log_prob_rows<true>(a, b, chunk, z2, diff2);
  else
    log_prob_rows<false>(a, b, chunk, z2, diff2);
}

template <bool with_ref>
EDITR2_HD void backward_rows(const LogProbArgs& a, int64_t b, int64_t chunk) {
  const Row row = reinterpret_cast<const Row*>(a.table)[a.step_index[b]];
  const float g_lp = a.grad_log_prob != nullptr ? a.grad_log_prob[b] : 0.0f;
  const float g_md = with_ref ? a.grad_mean_diff[b] : 0.0f;
  const GradientScale scale = gradient_scale(row, g_lp, g_md, a.n);
  replay<with_ref>(a, row, b, chunk, [&](int64_t i, int64_t valid, F* z, F* diff) {
    for (int n = 0; n < kVectors; ++n) {
      z[n] = z[n] * scale.on_z;
      if (with_ref) z[n] = z[n] + diff[n] * scale.on_diff;
    }
    unsigned char* out = element(a.grad_v, b, i, a.n);
    if (valid == kBlock) {
      store_block(out, a.grad_v.dtype, z);
    } else {
      Padded padded;
      store_block(padded.bytes, a.grad_v.dtype, z);
      __builtin_memcpy(out, padded.bytes, static_cast<size_t>(valid * size_of(a.grad_v.dtype)));
    }
  });
}

void backward_chunk(const LogProbArgs& a, int64_t b, int64_t chunk) {
  if (a.v_ref.data != nullptr && a.grad_mean_diff != nullptr)
    backward_rows<true>(a, b, chunk);
  else
    backward_rows<false>(a, b, chunk);
}

}  // namespace

extern const editr2::Kernels kernels;
const editr2::Kernels kernels = {EDITR2_NAME, normal_chunk, step_chunk, log_prob_chunk,
                                 backward_chunk};

}  // namespace EDITR2_NS
