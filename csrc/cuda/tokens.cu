// token_log_prob. Forward: a block a row, which walks the vocabulary twice, the second time out of the L2
// cache. Backward: a block a chunk of a row, elementwise.
#include "../softmax.h"
#include "common.cuh"

namespace editr2::gpu {
namespace {

struct TokenView {
  Lanes logits;
  const int64_t* ids;
  float scale;  // 1 / temperature
  int64_t ignore_index, v;
};

// Eight logits of a row from `i` on, -infinity beyond its end.
__device__ __forceinline__ void logits8(const TokenView& a, int64_t row, int64_t i, float out[kVector]) {
  const int64_t left = a.v - i;
  const int valid = left >= kVector ? kVector : static_cast<int>(left);
  load8(a.logits, row, i, valid, out);
#pragma unroll
  for (int k = 0; k < kVector; ++k) out[k] = k < valid ? out[k] : -INFINITY;
}

struct TokenArgs {
  TokenView row;
  float *log_prob, *entropy, *lse;
};

__global__ void __launch_bounds__(kThreads) token_kernel(const __grid_constant__ TokenArgs a) {
  __shared__ double maxima[kWarps];
  __shared__ float shared[2 * kWarps];
  __shared__ float totals[2];
  const int64_t row = blockIdx.x, id = a.row.ids[row];
  const bool ignored = id == a.row.ignore_index;
  float m = -INFINITY, sums[2] = {0.0f, 0.0f};
  if (!ignored) {  // the same for the whole block
    for (int64_t i = threadIdx.x * kVector; i < a.row.v; i += kChunk) {
      float l[kVector];
      logits8(a.row, row, i, l);
#pragma unroll
      for (int k = 0; k < kVector; ++k) m = l[k] > m ? l[k] : m;  // a NaN comes back through the exponents
    }
    m = static_cast<float>(block_max(m, maxima));
    for (int64_t i = threadIdx.x * kVector; i < a.row.v; i += kChunk) {
      float d[kVector], e[kVector];
      logits8(a.row, row, i, d);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        d[k] = bounded_exponent<ScalarLanes>((d[k] - m) * a.row.scale);
        e[k] = exp_bounded<ScalarLanes>(d[k]);
        d[k] = e[k] * d[k];
      }
      sums[0] += sum8(e);
      sums[1] += sum8(d);
    }
    block_sums<2>(sums, shared, totals);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  TokenRow result = {0.0f, 0.0f, 0.0f};
  if (ignored) {
    m = 0.0f;
  } else if (id < 0 || id >= a.row.v) {
    m = NAN;
    result = {NAN, NAN, NAN};
  } else {
    float own[kVector];
    load8(a.row.logits.data, a.row.logits.dtype, false, row * a.row.logits.stride + id, 1, own);
    result = token_row(totals[0], totals[1], (own[0] - m) * a.row.scale);
  }
  a.log_prob[row] = result.log_prob;
  a.entropy[row] = result.entropy;
  a.lse[2 * row] = m;
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
      const float rest = token_gradient<ScalarLanes>((g[k] - m) * a.row.scale, log_sum, entropy, on_log_prob, on_entropy);
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

}  // namespace editr2::gpu
