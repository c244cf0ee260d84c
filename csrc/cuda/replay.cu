// sde_log_prob, grpo_loss and the backward pass of both.
#include "replay.cuh"

namespace editr2::gpu {
namespace {

constexpr int kReplayMoments = 3;  // z^2, (factor (u - v_ref))^2, (B (u - v_old))^2

struct MomentArgs {
  ReplayView replay;
  int kl_scale;
  float* partials;
};

__device__ __forceinline__ void square_difference8(const Lanes& other, float factor, const Span& at,
                                                   const float u[kVector], float* sum) {
  if (other.data == nullptr) return;
  float a[kVector];
  load8(other, at.b, at.i, at.valid, a);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float d = (u[k] - a[k]) * factor;
    a[k] = k < at.valid ? d * d : 0.0f;
  }
  *sum = sum8(a);
}

__global__ void __launch_bounds__(kThreads) replay_kernel(const __grid_constant__ MomentArgs a) {
  __shared__ float shared[kReplayMoments * kWarps];
  const LatentsView& latents = a.replay.latents;
  const Span at = span_of(latents.chunks, latents.n);
  float sums[kReplayMoments] = {0.0f, 0.0f, 0.0f};
  if (at.valid > 0) {
    const Sample s = sample_at(latents, at.b);
    Velocity q;
    velocity8(latents, s, at, true, q);
    float z[kVector];
    residual8(a.replay, s, at, true, q.u, z);
#pragma unroll
    for (int k = 0; k < kVector; ++k) z[k] = k < at.valid ? z[k] * z[k] : 0.0f;
    sums[0] = sum8(z);
    square_difference8(a.replay.v_ref, reference_factor(s.row, a.kl_scale), at, q.u, &sums[1]);
    square_difference8(a.replay.v_old, s.row.B, at, q.u, &sums[2]);
  }
  block_sums<kReplayMoments>(sums, shared, a.partials + static_cast<int64_t>(blockIdx.x) * kReplayMoments);
}

struct LogProbArgs {
  LatentsView latents;
  const float* partials;
  int count;
  float *log_prob, *mean_diff;
  int64_t batch;
};

__global__ void __launch_bounds__(kThreads) log_prob_kernel(const __grid_constant__ LogProbArgs a) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of();
  if (b >= a.batch) return;  // a whole warp
  const Row row = sample_at(a.latents, b).row;
  if (a.log_prob != nullptr) {
    const float scaled = row.w * sample_mean(a.partials, b, a.latents.chunks, a.count, 0, a.latents.n);
    if (lane_of() == 0) a.log_prob[b] = scaled + row.c;
  }
  if (a.mean_diff != nullptr) {
    const float mean = sample_mean(a.partials, b, a.latents.chunks, a.count, 1, a.latents.n);
    if (lane_of() == 0) a.mean_diff[b] = mean;
  }
}

struct GrpoArgs {
  LatentsView latents;
  GrpoOptions options;
  GrpoBatch samples;
  bool has_ref;
  const float* moments;  // [batch, kMaxMoments]
  int64_t batch;
};

__global__ void __launch_bounds__(kThreads) grpo_kernel(const __grid_constant__ GrpoArgs a) {
  __shared__ double shared[kWarps];
  const GrpoBatch& out = a.samples;
  const double counted = count_samples(out.mask, a.batch, shared);
  const float weight = sample_weight(out.normalizer, counted);
  double loss = 0.0, ratio = 0.0, approx_kl = 0.0, kl = 0.0, policy = 0.0;
  float deviation = 0.0f, low = 0.0f, high = 0.0f, bad = 0.0f;  // a maximum and counts: exact
  for (int64_t b = threadIdx.x; b < a.batch; b += kThreads) {
    const bool counts = out.mask == nullptr || out.mask[b] != 0;
    const float* m = a.moments + kMaxMoments * b;
    const GrpoSample s = grpo_sample(sample_at(a.latents, b).row, a.latents.n, m[0], m[1], a.has_ref, m[2],
                                     out.old_log_prob[b], out.advantage[b], counts ? weight : 0.0f, a.options);
    out.log_prob[b] = s.log_prob;
    out.ratio[b] = s.ratio;
    out.kl[b] = s.kl;
    float* factors = out.factors + 3 * b;
    factors[0] = s.factors.on_z, factors[1] = s.factors.on_ref, factors[2] = s.factors.on_old;
    if (!counts) continue;
    const float of_sample = s.policy + a.options.kl_weight * s.kl;
    loss += static_cast<double>(weight * of_sample);
    ratio += s.ratio;
    deviation = larger(deviation, s.ratio < 1.0f ? 1.0f - s.ratio : s.ratio - 1.0f);
    low += s.ratio < 1.0f - a.options.clip_low ? 1.0f : 0.0f;
    high += s.ratio > 1.0f + a.options.clip_high ? 1.0f : 0.0f;
    approx_kl += s.log_ratio * s.log_ratio * 0.5f;
    kl += s.kl;
    policy += s.policy;
    bad += is_finite(of_sample) ? 0.0f : 1.0f;
  }
  const double over_counted = counted < 1.0 ? 0.0 : 1.0 / counted;
  put(out.loss, block_sum(loss, shared));
  put(out.metrics + kRatioMean, block_sum(ratio, shared) * over_counted);
  put(out.metrics + kRatioMaxDeviation, block_max(deviation, shared));
  put(out.metrics + kClipFractionLow, block_sum(low, shared) * over_counted);
  put(out.metrics + kClipFractionHigh, block_sum(high, shared) * over_counted);
  put(out.metrics + kApproxKl, block_sum(approx_kl, shared) * over_counted);
  put(out.metrics + kKl, block_sum(kl, shared) * over_counted);
  put(out.metrics + kPolicyLoss, block_sum(policy, shared) * over_counted);
  put(out.metrics + kNonFinite, block_sum(bad, shared) > 0.0 ? 1.0 : 0.0);
}

struct FactorsArgs {
  LatentsView latents;
  const float *grad_log_prob, *grad_mean_diff;
  float* factors;
  int64_t batch;
};

// A sample's factors from the gradients of its log_prob and mean_diff, where null is 0. On their own because
// their fp64 division would be repeated by every thread of the backward pass.
__global__ void __launch_bounds__(kThreads) factors_kernel(const __grid_constant__ FactorsArgs a) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= a.batch) return;
  const float g_lp = a.grad_log_prob == nullptr ? 0.0f : a.grad_log_prob[b];
  const float g_md = a.grad_mean_diff == nullptr ? 0.0f : a.grad_mean_diff[b];
  const GradientScale scale = gradient_scale(sample_at(a.latents, b).row, g_lp, g_md, a.latents.n);
  float* factors = a.factors + 3 * b;
  factors[0] = scale.on_z, factors[1] = scale.on_diff, factors[2] = 0.0f;
}

struct BackwardArgs {
  ReplayView replay;
  FactorsView factors;
  Lanes grad_v, grad_v_uncond, grad_v_uncond_image;
};

__device__ __forceinline__ void store_zeros(const Lanes& t, const Span& at) {
  if (t.data == nullptr) return;
  float zeros[kVector] = {};
  store8(t, at.b, at.i, at.valid, zeros);
}

__device__ __forceinline__ void store_scaled(const Lanes& t, const Span& at, float factor, const float g[kVector]) {
  if (t.data == nullptr) return;
  float scaled[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) scaled[k] = factor * g[k];
  store8(t, at.b, at.i, at.valid, scaled);
}

// Takes g, the gradient to what renormalisation made, through it: g becomes s g - on_w dot w, and
// `to_v` what flows to v past the guidance.
__device__ __forceinline__ void unscale8(const LatentsView& a, const Sample& s, const Span& at, const Velocity& q,
                                         float g[kVector], float to_v[kVector]) {
  if (s.scales == nullptr) return;
  RowCursor cursor(s, at.i, a.width);
  const bool one_row = a.width % kVector == 0;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const RowScale& scale = cursor.scale;
    const float on_w = scale.on_w * scale.dot, on_v = scale.on_v * scale.dot;
    g[k] = scale.s * g[k] - on_w * q.w[k];
    to_v[k] = on_v * q.v[k];
    if (!one_row) cursor.next(k + 1 < at.valid);
  }
}

__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ BackwardArgs a) {
  const LatentsView& latents = a.replay.latents;
  const Span at = span_of(latents.chunks, latents.n);
  if (at.valid == 0) return;
  const Sample s = sample_at(latents, at.b);
  const Factors f = factors_at(a.factors, at.b);
  if (all_zero(f)) {  // not read at all: NaN in a masked sample must not leak
    store_zeros(a.grad_v, at);
    store_zeros(a.grad_v_uncond, at);
    store_zeros(a.grad_v_uncond_image, at);
    return;
  }
  Velocity q;
  velocity8(latents, s, at, true, q);
  float g[kVector], to_v[kVector];
  gradient8(a.replay, s, f, at, true, q.u, g);
#pragma unroll
  for (int k = 0; k < kVector; ++k) to_v[k] = 0.0f;
  const bool text_first = latents.renorm == kTextChannel;
  if (!text_first) unscale8(latents, s, at, q, g, to_v);
  store_scaled(a.grad_v_uncond_image, at, 1.0f - s.guide.image, g);
#pragma unroll
  for (int k = 0; k < kVector; ++k) g[k] = s.guide.image * g[k];
  if (text_first) unscale8(latents, s, at, q, g, to_v);
  store_scaled(a.grad_v_uncond, at, 1.0f - s.guide.text, g);
  if (a.grad_v.data == nullptr) return;
#pragma unroll
  for (int k = 0; k < kVector; ++k) g[k] = s.guide.text * g[k] + to_v[k];
  store8(a.grad_v, at.b, at.i, at.valid, g);
}

ReplayView replay_lanes(const Latents& latents, const Rows& x_next, const Rows& v_ref, const Rows& v_old,
                        int64_t batch) {
  check_sizes(batch, latents.n);
  ReplayView view = {};
  view.x_next = lanes_of(x_next, batch * latents.n > 0, "x_next");
  view.v_ref = lanes_of(v_ref, false, "v_ref");
  view.v_old = lanes_of(v_old, false, "v_old");
  return view;
}

void fill_partials(const ReplayView& replay, int kl_scale, float* partials, int64_t batch, const Target& target) {
  if (batch * replay.latents.n > 0)
    EDITR2_LAUNCH(replay_kernel, grid_of(batch * replay.latents.chunks), kThreads, 0, target.stream,
                  MomentArgs{replay, kl_scale, partials});
}

}  // namespace

void finish_log_prob(const LatentsView& latents, const float* partials, int count, float* log_prob, float* mean_diff,
                     int64_t batch, const Target& target) {
  if (batch == 0 || (log_prob == nullptr && mean_diff == nullptr)) return;
  EDITR2_LAUNCH(log_prob_kernel, grid_of(ceil_div(batch, kWarps)), kThreads, 0, target.stream,
                LogProbArgs{latents, partials, count, log_prob, mean_diff, batch});
}

void sde_log_prob(const Latents& latents, Rows x_next, Rows v_ref, float* log_prob, float* mean_diff,
                  void* workspace, int64_t batch, Target target) {
  ReplayView view = replay_lanes(latents, x_next, v_ref, {}, batch);
  Workspace scratch;
  const DeviceGuard guard(target.device);
  view.latents = prepare(latents, workspace, batch, target, scratch);
  fill_partials(view, kMean, scratch.partials, batch, target);
  finish_log_prob(view.latents, scratch.partials, kReplayMoments, log_prob, mean_diff, batch, target);
}

void grpo_loss(const Latents& latents, Rows x_next, Rows v_ref, Rows v_old, const GrpoOptions& options,
               const GrpoBatch& samples, void* workspace, int64_t batch, Target target) {
  ReplayView view = replay_lanes(latents, x_next, v_ref, v_old, batch);
  need(options.kl_scale >= kStep && options.kl_scale <= kVelocity, "kl_scale", options.kl_scale, "0 to 3");
  if (options.guard && batch * latents.n > 0) need_pointer(v_old.data, "v_old");
  need_pointer(samples.loss, "loss");
  need_pointer(samples.metrics, "metrics");
  if (batch > 0) {
    need_pointer(samples.old_log_prob, "old_log_prob");
    need_pointer(samples.advantage, "advantage");
    need_pointer(samples.log_prob, "log_prob");
    need_pointer(samples.ratio, "ratio");
    need_pointer(samples.kl, "kl");
    need_pointer(samples.factors, "factors");
  }
  Workspace scratch;
  const DeviceGuard guard(target.device);
  view.latents = prepare(latents, workspace, batch, target, scratch);
  fill_partials(view, options.kl_scale, scratch.partials, batch, target);
  fill_moments(scratch, view.latents.chunks, kReplayMoments, latents.n, batch, target);
  EDITR2_LAUNCH(grpo_kernel, 1, kThreads, 0, target.stream,
                GrpoArgs{view.latents, options, samples, view.v_ref.data != nullptr, scratch.moments, batch});
}

void replay_backward(const Latents& latents, Rows x_next, Rows v_ref, Rows v_old, const Incoming& incoming,
                     Rows grad_v, Rows grad_v_uncond, Rows grad_v_uncond_image, void* workspace, int64_t batch,
                     Target target) {
  BackwardArgs a = {};
  a.replay = replay_lanes(latents, x_next, v_ref, v_old, batch);
  a.grad_v = lanes_of(grad_v, false, "grad_v");
  a.grad_v_uncond = lanes_of(grad_v_uncond, false, "grad_v_uncond");
  a.grad_v_uncond_image = lanes_of(grad_v_uncond_image, false, "grad_v_uncond_image");
  if (batch * latents.n > 0 && incoming.grad_mean_diff != nullptr) need_pointer(v_ref.data, "v_ref");
  Workspace scratch;
  const DeviceGuard guard(target.device);
  a.replay.latents = prepare(latents, workspace, batch, target, scratch);
  if (batch * latents.n == 0) return;
  a.factors = {incoming.factors, incoming.scale};
  if (incoming.factors == nullptr) {
    a.factors = {scratch.moments, nullptr};
    EDITR2_LAUNCH(factors_kernel, grid_of(ceil_div(batch, kThreads)), kThreads, 0, target.stream,
                  FactorsArgs{a.replay.latents, incoming.grad_log_prob, incoming.grad_mean_diff, scratch.moments,
                              batch});
  }
  if (a.replay.latents.scales != nullptr) fill_row_dots(a.replay, a.factors, scratch, batch, target);
  EDITR2_LAUNCH(backward_kernel, grid_of(batch * a.replay.latents.chunks), kThreads, 0, target.stream, a);
}

}  // namespace editr2::gpu
