// token_log_prob. Forward: a block a row, which reads the vocabulary once: where a larger logit appears, what was added
// so far is scaled to it. Backward: a block a chunk of a row, elementwise.
#include "../softmax.h"
#include "common.cuh"

namespace editr2 {

// These kernels are bound by their instructions, and no other backend has to have the bits of an exponential.
struct FusedLanes : ScalarLanes {};
template <>
EDITR2_HD float multiply_add<FusedLanes>(float a, float b, float c) {
  return fmaf(a, b, c);
}

namespace gpu {
namespace {

constexpr int kLoads = 2;  // of eight elements that a thread has under way
constexpr int kTile = kLoads * kChunk;

struct TokenView {
  Lanes logits;
  const int64_t* ids;
  float scale;  // 1 / temperature
  int64_t ignore_index, v;
};

struct TokenArgs {
  TokenView row;
  float *log_prob, *entropy, *lse;
};

// Over what a thread has read: sums of exp(d) and exp(d) d, d = (logit - m) / T, m being the largest logit that its
// warp has read. A warp has one m, so that it rises a few times in a row and what that costs is not paid by element.
struct Running {
  float m, sums[2];
};

// To a larger m. exp(d + shift) = exp(d) exp(shift), and d becomes d + shift.
__device__ __forceinline__ void raise(Running& r, float m, float scale) {
  const float shift = bounded_exponent<FusedLanes>((r.m - m) * scale);  // NaN where both are infinite
  const float factor = exp_bounded<FusedLanes>(shift);
  r.sums[1] = (r.sums[1] + r.sums[0] * shift) * factor;
  r.sums[0] = r.sums[0] * factor;
  r.m = m;
}

__device__ __forceinline__ float largest(int64_t left, float l[kVector]) {
  float m = -INFINITY;
  if (left < kVector) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) l[k] = k < left ? l[k] : -INFINITY;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) m = fmaxf(m, l[k]);  // a NaN is passed over: it comes back through the exponents
  return m;
}

__device__ __forceinline__ void add8(const TokenView& a, Running& r, float d[kVector]) {
  const float m = r.m == -INFINITY ? 0.0f : r.m;  // nothing but -infinity and NaN so far
  float e[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    d[k] = bounded_exponent<FusedLanes>((d[k] - m) * a.scale);
    e[k] = exp_bounded<FusedLanes>(d[k]);
    d[k] = e[k] * d[k];
  }
  r.sums[0] += sum8(e);
  r.sums[1] += sum8(d);
}

__global__ void __launch_bounds__(kThreads) token_kernel(const __grid_constant__ TokenArgs a) {
  __shared__ double maxima[kWarps];
  __shared__ float shared[2 * kWarps];
  __shared__ float totals[2];
  const int64_t row = blockIdx.x, id = a.row.ids[row];
  const bool ignored = id == a.row.ignore_index;
  Running r = {-INFINITY, {0.0f, 0.0f}};
  if (!ignored) {  // the same for the whole block
    const Lanes& logits = a.row.logits;
    for (int64_t i = threadIdx.x * kVector; i - lane_of() * kVector < a.row.v; i += kTile) {  // whole warps
      uint32_t stored[kLoads][kVector];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t at = i + j * kChunk, left = a.row.v - at;
        fetch8(logits.data, logits.dtype, logits.wide, row * logits.stride + at,
               left >= kVector ? kVector : static_cast<int>(left), stored[j]);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        float l[kVector];
        unpack8(stored[j], logits.dtype, l);
        float m = largest(a.row.v - i - j * kChunk, l);
        if (__any_sync(kAllLanes, m > r.m)) {
          for (int distance = kWarp / 2; distance > 0; distance /= 2)
            m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, distance));
          raise(r, m, a.row.scale);
        }
        add8(a.row, r, l);
      }
    }
    raise(r, static_cast<float>(block_max(r.m, maxima)), a.row.scale);
    block_sums<2>(r.sums, shared, totals);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  TokenRow result = {0.0f, 0.0f, 0.0f};
  if (ignored) {
    r.m = 0.0f;
  } else if (id < 0 || id >= a.row.v) {
    r.m = NAN;
    result = {NAN, NAN, NAN};
  } else {
    float own[kVector];
    load8(a.row.logits.data, a.row.logits.dtype, false, row * a.row.logits.stride + id, 1, own);
    result = token_row(totals[0], totals[1], (own[0] - r.m) * a.row.scale);
  }
  a.log_prob[row] = result.log_prob;
  a.entropy[row] = result.entropy;
  a.lse[2 * row] = r.m;
  a.lse[2 * row + 1] = result.log_sum;
}

struct TokenGradArgs {
  TokenView row;
  const float *lse, *entropy, *grad_log_prob, *grad_entropy;
  Lanes grad;  // may be the logits: a thread reads its elements before it writes them
  unsigned chunks;
};

__global__ void __launch_bounds__(kThreads) token_backward_kernel(const __grid_constant__ TokenGradArgs a) {
  const Span at = span_of(a.chunks, a.row.v);
  if (at.valid == 0) return;
  const int64_t id = a.row.ids[at.b];
  float g[kVector] = {};
  if (id != a.row.ignore_index) {
    const float m = a.lse[2 * at.b], log_sum = a.lse[2 * at.b + 1], entropy = a.entropy[at.b];
    const float on_log_prob = a.grad_log_prob != nullptr ? a.grad_log_prob[at.b] : 0.0f;
    const float on_entropy = a.grad_entropy != nullptr ? a.grad_entropy[at.b] : 0.0f;
    load8(a.row.logits, at.b, at.i, at.valid, g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float rest = token_gradient<FusedLanes>((g[k] - m) * a.row.scale, log_sum, entropy, on_log_prob, on_entropy);
      g[k] = ((at.i + k == id ? on_log_prob : 0.0f) + rest) * a.row.scale;
    }
  }
  store8(a.grad, at.b, at.i, at.valid, g);
}

TokenView view_of(const TokenRows& in) {
  check_sizes(in.m, in.v);
  need(in.v >= 1, "V", in.v, "a vocabulary of at least 1");
  if (!(in.temperature > 0.0)) reject("temperature", std::to_string(in.temperature), "a number > 0");
  const Lanes logits = lanes_of(in.logits, in.m > 0, "logits");
  if (in.m > 0) need_pointer(in.ids, "ids");
  return {logits, in.ids, static_cast<float>(1.0 / in.temperature), in.ignore_index, in.v};
}

}  // namespace

void token_log_prob(const TokenRows& rows, float* log_prob, float* entropy, float* lse, Target target) {
  const TokenView view = view_of(rows);
  if (rows.m == 0) return;
  need_pointer(log_prob, "log_prob");
  need_pointer(entropy, "entropy");
  need_pointer(lse, "lse");
  const DeviceGuard guard(target.device);
  EDITR2_LAUNCH(token_kernel, grid_of(rows.m), kThreads, 0, target.stream, TokenArgs{view, log_prob, entropy, lse});
}

void token_log_prob_backward(const TokenRows& rows, const float* lse, const float* entropy,
                             const float* grad_log_prob, const float* grad_entropy, Rows grad_logits,
                             Target target) {
  const TokenView view = view_of(rows);
  const Lanes grad = lanes_of(grad_logits, rows.m > 0, "grad_logits");
  if (rows.m == 0) return;
  need_pointer(lse, "lse");
  need_pointer(entropy, "entropy");
  const int64_t chunks = ceil_div(rows.v, kChunk);
  const DeviceGuard guard(target.device);
  EDITR2_LAUNCH(token_backward_kernel, grid_of(rows.m * chunks), kThreads, 0, target.stream,
                TokenGradArgs{view, lse, entropy, grad_log_prob, grad_entropy, grad, static_cast<unsigned>(chunks)});
}

}  // namespace gpu
}  // namespace editr2
