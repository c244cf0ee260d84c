// nft_loss and its backward pass.
#include "common.cuh"
#include "workspace.cuh"

namespace editr2::gpu {
namespace {

struct NftView {
  Lanes x0, noise, v, v_old, v_ref;
  float beta;
  int64_t n;
  unsigned chunks;
};

// v and, at v_old, the two directions the loss pulls apart: e - beta d and e + beta d.
struct Directions {
  float v[kVector], positive[kVector], negative[kVector];
};
__device__ __forceinline__ void directions8(const NftView& a, const Span& at, Directions& q) {
  float e[kVector], other[kVector];
  load8(a.noise, at.b, at.i, at.valid, e);
  load8(a.x0, at.b, at.i, at.valid, other);
#pragma unroll
  for (int k = 0; k < kVector; ++k) e[k] = e[k] - other[k];
  load8(a.v, at.b, at.i, at.valid, q.v);
  load8(a.v_old, at.b, at.i, at.valid, other);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float error = e[k] - other[k];
    const float d = (q.v[k] - other[k]) * a.beta;
    q.positive[k] = error - d;
    q.negative[k] = error + d;
  }
}

struct NftMomentArgs {
  NftView latents;
  float* partials;
};

__device__ __forceinline__ float sum_squares(const float a[kVector], int valid) {
  float squares[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) squares[k] = k < valid ? a[k] * a[k] : 0.0f;
  return sum8(squares);
}

__device__ __forceinline__ float sum_abs(const float a[kVector], int valid) {
  float magnitudes[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) magnitudes[k] = k < valid ? fabsf(a[k]) : 0.0f;
  return sum8(magnitudes);
}

__global__ void __launch_bounds__(kThreads) nft_kernel(const __grid_constant__ NftMomentArgs a) {
  __shared__ float shared[kMaxMoments * kWarps];
  const Span at = span_of(a.latents.chunks, a.latents.n);
  float sums[kMaxMoments] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};  // in the order of NftMoments
  if (at.valid > 0) {
    Directions q;
    directions8(a.latents, at, q);
    sums[0] = sum_abs(q.positive, at.valid);
    sums[1] = sum_squares(q.positive, at.valid);
    sums[2] = sum_abs(q.negative, at.valid);
    sums[3] = sum_squares(q.negative, at.valid);
    if (a.latents.v_ref.data != nullptr) {
      float ref[kVector];
      load8(a.latents.v_ref, at.b, at.i, at.valid, ref);
#pragma unroll
      for (int k = 0; k < kVector; ++k) ref[k] = q.v[k] - ref[k];
      sums[4] = sum_squares(ref, at.valid);
    }
  }
  block_sums<kMaxMoments>(sums, shared, a.partials + static_cast<int64_t>(blockIdx.x) * kMaxMoments);
}

struct NftFinishArgs {
  NftOptions options;
  NftBatch samples;
  bool has_ref;
  const float* moments;  // [batch, kMaxMoments]
  int64_t batch, n;
};

__global__ void __launch_bounds__(kThreads) nft_finish_kernel(const __grid_constant__ NftFinishArgs a) {
  __shared__ double shared[kWarps];
  const NftBatch& out = a.samples;
  const double counted = count_samples(out.mask, a.batch, shared);
  const float weight = sample_weight(out.normalizer, counted);
  double loss = 0.0, policy = 0.0, positive = 0.0, negative = 0.0, reference = 0.0, bad = 0.0;
  for (int64_t b = threadIdx.x; b < a.batch; b += kThreads) {
    const bool counts = out.mask == nullptr || out.mask[b] != 0;
    const float* m = a.moments + kMaxMoments * b;
    const NftSample s = nft_sample({m[0], m[1], m[2], m[3], m[4]}, a.has_ref, out.sigma[b], out.r[b], a.n,
                                   counts ? weight : 0.0f, a.options);
    float* factors = out.factors + 3 * b;
    factors[0] = s.on_positive, factors[1] = s.on_negative, factors[2] = s.on_ref;
    if (!counts) continue;
    const float of_sample = s.policy + a.options.ref_weight * s.reference;
    loss += static_cast<double>(weight * of_sample);
    policy += s.policy;
    positive += s.positive;
    negative += s.negative;
    reference += s.reference;
    bad += is_finite(of_sample) ? 0.0 : 1.0;
  }
  const double over_counted = counted < 1.0 ? 0.0 : 1.0 / counted;
  put(out.loss, block_sum(loss, shared));
  put(out.metrics + kNftPolicyLoss, block_sum(policy, shared) * over_counted);
  put(out.metrics + kNftPositive, block_sum(positive, shared) * over_counted);
  put(out.metrics + kNftNegative, block_sum(negative, shared) * over_counted);
  put(out.metrics + kNftReference, block_sum(reference, shared) * over_counted);
  put(out.metrics + kNftNonFinite, block_sum(bad, shared) > 0.0 ? 1.0 : 0.0);
}

struct NftBackwardArgs {
  NftView latents;
  const float *factors, *scale;
  Lanes grad_v;
};

__global__ void __launch_bounds__(kThreads) nft_backward_kernel(const __grid_constant__ NftBackwardArgs a) {
  const Span at = span_of(a.latents.chunks, a.latents.n);
  if (at.valid == 0) return;
  const float scale = a.scale == nullptr ? 1.0f : *a.scale;
  const float* f = a.factors + 3 * at.b;
  const float on_positive = scaled_factor(f[0], scale), on_negative = scaled_factor(f[1], scale),
              on_ref = scaled_factor(f[2], scale);
  float g[kVector] = {};
  if (on_positive != 0.0f || on_negative != 0.0f || on_ref != 0.0f) {  // else not read: NaN must not leak
    Directions q;
    directions8(a.latents, at, q);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {  // a side whose factor is 0 is not evaluated: inf * 0 is NaN
      if (on_positive != 0.0f) g[k] = q.positive[k] * on_positive;
      if (on_negative != 0.0f) g[k] = g[k] + q.negative[k] * on_negative;
    }
    if (a.latents.v_ref.data != nullptr && on_ref != 0.0f) {
      float ref[kVector];
      load8(a.latents.v_ref, at.b, at.i, at.valid, ref);
#pragma unroll
      for (int k = 0; k < kVector; ++k) g[k] = g[k] + (q.v[k] - ref[k]) * on_ref;
    }
  }
  store8(a.grad_v, at.b, at.i, at.valid, g);
}

NftView view_of(const NftLatents& in, int64_t batch) {
  check_sizes(batch, in.n);
  const bool any = batch * in.n > 0;
  grid_of(batch * ceil_div(in.n, kChunk));
  return {lanes_of(in.x0, any, "x0"),
          lanes_of(in.noise, any, "noise"),
          lanes_of(in.v, any, "v"),
          lanes_of(in.v_old, any, "v_old"),
          lanes_of(in.v_ref, false, "v_ref"),
          in.beta,
          in.n,
          static_cast<unsigned>(ceil_div(in.n, kChunk))};
}

}  // namespace

void nft_loss(const NftLatents& latents, const NftOptions& options, const NftBatch& samples, void* workspace,
              int64_t batch, Target target) {
  const NftView view = view_of(latents, batch);
  need_pointer(samples.loss, "loss");
  need_pointer(samples.metrics, "metrics");
  if (batch > 0) {
    need_pointer(samples.sigma, "sigma");
    need_pointer(samples.r, "r");
    need_pointer(samples.factors, "factors");
    need_workspace(workspace);
  }
  const Workspace scratch = workspace_of(workspace, batch, latents.n, 0, kNoRenorm);
  const DeviceGuard guard(target.device);
  if (batch * latents.n > 0)
    EDITR2_LAUNCH(nft_kernel, grid_of(batch * view.chunks), kThreads, 0, target.stream,
                  NftMomentArgs{view, scratch.partials});
  fill_moments(scratch, view.chunks, kMaxMoments, latents.n, batch, target);
  EDITR2_LAUNCH(nft_finish_kernel, 1, kThreads, 0, target.stream,
                NftFinishArgs{options, samples, view.v_ref.data != nullptr, scratch.moments, batch, latents.n});
}

void nft_loss_backward(const NftLatents& latents, const float* factors, const float* scale, Rows grad_v,
                       int64_t batch, Target target) {
  const NftView view = view_of(latents, batch);
  const bool any = batch * latents.n > 0;
  const Lanes grad = lanes_of(grad_v, any, "grad_v");
  if (!any) return;
  need_pointer(factors, "factors");
  const DeviceGuard guard(target.device);
  EDITR2_LAUNCH(nft_backward_kernel, grid_of(batch * view.chunks), kThreads, 0, target.stream,
                NftBackwardArgs{view, factors, scale, grad});
}

}  // namespace editr2::gpu
