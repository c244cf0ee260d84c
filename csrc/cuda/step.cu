// philox_normal, sde_step and the versions of CUDA.
#include "latents.cuh"

namespace editr2::gpu {

struct NormalArgs {
  const int64_t *seed, *step;
  Lanes out;
  int64_t n;
  unsigned chunks;
};

__global__ void __launch_bounds__(kThreads) normal_kernel(const NormalArgs a) {
  const Span at = span_of(a.chunks, a.n);
  if (at.valid == 0) return;
  float z[kVector];
  normal8(static_cast<uint64_t>(a.seed[at.b]), static_cast<uint32_t>(a.step[at.b]), at.i, z);
  store8(a.out, at.b, at.i, at.valid, z);
}

void philox_normal(const int64_t* seed, const int64_t* step, Rows out, int64_t batch, int64_t n, Target target) {
  check_sizes(batch, n);
  const Lanes lanes = lanes_of(out, batch * n > 0, "out");
  if (batch * n == 0) return;
  need_pointer(seed, "seed");
  need_pointer(step, "step");
  const DeviceGuard guard(target.device);
  EDITR2_LAUNCH(normal_kernel, grid_of(batch * ceil_div(n, kChunk)), kThreads, 0, target.stream,
                NormalArgs{seed, step, lanes, n, static_cast<unsigned>(ceil_div(n, kChunk))});
}

struct StepArgs {
  LatentsView latents;
  Lanes noise, x_next, x0;
  const int64_t* seed;
  bool score_stored;
  float* partials;  // null: no log-probability is asked for
};

__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ StepArgs a) {
  __shared__ float shared[kWarps];
  const Span at = span_of(a.latents.chunks, a.latents.n);
  float z2[1] = {0.0f};
  if (at.valid > 0) {
    uint32_t of_x[kVector], of_v[kVector];  // under way while the sample's row is looked up
    fetch8(a.latents.x, at.b, at.i, at.valid, of_x);
    fetch8(a.latents.v, at.b, at.i, at.valid, of_v);
    const Sample s = sample_at(a.latents, at.b);
    float x[kVector], mu[kVector], next[kVector];
    Velocity q;
    unpack8(of_x, a.latents.x.dtype, x);
    unpack8(of_v, a.latents.v.dtype, q.v);
    guide_velocity8(a.latents, s, at, true, q);
    mean8(a.latents, s, at, true, x, q.u, mu);
    if (a.x0.data != nullptr) {
      float clean[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) clean[k] = clean_prediction(s.row, x[k], q.u[k]);
      store8(a.x0, at.b, at.i, at.valid, clean);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) next[k] = mu[k];
    if (s.row.S != 0.0f) {
      float eps[kVector];
      if (a.noise.data != nullptr)
        load8(a.noise, at.b, at.i, at.valid, eps);
      else
        normal8(static_cast<uint64_t>(a.seed[at.b]), static_cast<uint32_t>(a.latents.step_index[at.b]), at.i, eps);
#pragma unroll
      for (int k = 0; k < kVector; ++k) next[k] = transition_sample(s.row, mu[k], eps[k]);
    }
    float stored[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) stored[k] = next[k];
    store8(a.x_next, at.b, at.i, at.valid, stored);
    if (a.score_stored) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) next[k] = stored[k];
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float z = next[k] - mu[k];
      mu[k] = z * z;
    }
    if (at.valid < kVector) {  // asked once, not once an element: this kernel is bound by its instructions
#pragma unroll
      for (int k = 0; k < kVector; ++k) mu[k] = k < at.valid ? mu[k] : 0.0f;
    }
    z2[0] = sum8(mu);
  }
  if (a.partials != nullptr) block_sums<1>(z2, shared, a.partials + blockIdx.x);
}

void sde_step(const Latents& latents, Rows noise, const int64_t* seed, Rows x_next, Rows x0, float* log_prob,
              bool score_stored, void* workspace, int64_t batch, Target target) {
  check_sizes(batch, latents.n);
  const bool any = batch * latents.n > 0;
  StepArgs a = {};
  a.noise = lanes_of(noise, false, "noise");
  a.x_next = lanes_of(x_next, any, "x_next");
  a.x0 = lanes_of(x0, false, "x0");
  if (any && noise.data == nullptr) need_pointer(seed, "seed");
  a.seed = seed;
  a.score_stored = score_stored;
  Workspace scratch;
  const DeviceGuard guard(target.device);
  a.latents = prepare(latents, workspace, batch, target, scratch);
  a.partials = log_prob == nullptr ? nullptr : scratch.partials;
  if (any) EDITR2_LAUNCH(step_kernel, grid_of(batch * a.latents.chunks), kThreads, 0, target.stream, a);
  finish_log_prob(a.latents, scratch.partials, 1, log_prob, nullptr, batch, target);
}

int driver_version() {
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "asking for the driver's version");
  return version;
}

int runtime_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "asking for the runtime's version");
  return version;
}

}  // namespace editr2::gpu
