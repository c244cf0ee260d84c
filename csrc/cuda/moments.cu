// The means of every sample's moments, a warp each: in the one block that finishes a loss they would be read by eight
// warps, and of 512 samples of 4,096 x 64 that is half a million partial sums one after another.
#include "workspace.cuh"

namespace editr2::gpu {
namespace {

struct MomentsArgs {
  const float* partials;  // [B, chunks, count]
  unsigned chunks;
  int count;
  int64_t n, batch;
  float* moments;  // [B, kMaxMoments]
};

__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ MomentsArgs a) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of();
  if (item >= a.batch * a.count) return;  // a whole warp
  const int64_t b = item / a.count;
  const int m = static_cast<int>(item - b * a.count);
  const float mean = sample_mean(a.partials, b, a.chunks, a.count, m, a.n);
  if (lane_of() == 0) a.moments[kMaxMoments * b + m] = mean;
}

}  // namespace

void fill_moments(const Workspace& scratch, unsigned chunks, int count, int64_t n, int64_t batch,
                  const Target& target) {
  if (batch == 0) return;
  EDITR2_LAUNCH(moments_kernel, grid_of(ceil_div(batch * count, kWarps)), kThreads, 0, target.stream,
                MomentsArgs{scratch.partials, chunks, count, n, batch, scratch.moments});
}

}  // namespace editr2::gpu
