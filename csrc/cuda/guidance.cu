// Renormalisation's passes before the others: the scale of every row from its norms and, for the backward
// pass, the dot product of every row.
//
// A row is cut into segments of kSegment elements; a power of two of neighbouring lanes, one for each 8
// elements up to a warp, adds one segment. Rows of several segments (`global`) are finished by a second
// launch, a warp a row. Both the cut and the trees depend on the row's width alone.
#include "replay.cuh"

namespace editr2::gpu {
namespace {

struct RowsArgs {
  ReplayView replay;    // norms: only its latents
  FactorsView factors;  // dots only
  float* sums;          // [B * rows_per_sample, segments, 2]
  uint32_t rows, segments, lanes;
  bool dots;
};

__device__ __forceinline__ void finish_row(const RowsArgs& a, uint32_t row, float first, float second) {
  RowScale* scale = a.replay.latents.scales + row;
  if (a.dots) {
    scale->dot = first;
  } else {
    const Scale made = renorm_scale(a.replay.latents.renorm, first, second);
    *scale = {made.s, made.on_w, made.on_v, 0.0f};
  }
}

// Adds what the elements of one thread contribute to the squares of v and w, or to the dot product.
__device__ __forceinline__ void add8(const RowsArgs& a, const Sample& s, const Factors& f, const Span& at, bool wide,
                                     float sums[2]) {
  const LatentsView& latents = a.replay.latents;
  Velocity q;
  velocity8(latents, s, at, wide, q);
  float first[kVector], second[kVector];
  if (a.dots) {
    gradient8(a.replay, s, f, at, wide, q.u, first);
    const float image = latents.renorm == kTextChannel ? s.guide.image : 1.0f;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float h = image * first[k];
      first[k] = q.w[k] * h;
      second[k] = 0.0f;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      first[k] = q.v[k] * q.v[k];
      second[k] = q.w[k] * q.w[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    first[k] = k < at.valid ? first[k] : 0.0f;
    second[k] = k < at.valid ? second[k] : 0.0f;
  }
  sums[0] += sum8(first);
  sums[1] += sum8(second);
}

__global__ void __launch_bounds__(kThreads) row_sums_kernel(const __grid_constant__ RowsArgs a) {
  const uint32_t lane = threadIdx.x % a.lanes, item = blockIdx.x * (kThreads / a.lanes) + threadIdx.x / a.lanes;
  const uint32_t row = item / a.segments, segment = item - row * a.segments;
  const LatentsView& latents = a.replay.latents;
  float sums[2] = {0.0f, 0.0f};
  bool counts = row < a.rows;
  if (counts) {  // no early return: the lanes of a warp meet again in the sums
    const uint32_t b = row / latents.rows_per_sample;
    Sample s = sample_at(latents, b);
    Factors f = {};
    if (!a.dots) s.scales = nullptr;  // they are what is being made
    if (a.dots) f = factors_at(a.factors, b);
    counts = s.guide.active && !(a.dots && all_zero(f));
    if (counts) {
      const uint32_t start = (row - b * latents.rows_per_sample) * latents.width;
      const uint32_t end = segment + 1 < a.segments ? (segment + 1) * kSegment : latents.width;
      for (uint32_t at = segment * kSegment + lane * kVector; at < end; at += a.lanes * kVector) {
        const int valid = end - at >= kVector ? kVector : static_cast<int>(end - at);
        add8(a, s, f, {b, start + at, valid}, latents.width % kVector == 0, sums);
      }
    }
  }
  const float first = lanes_sum(sums[0], a.lanes), second = lanes_sum(sums[1], a.lanes);
  if (lane != 0 || !counts) return;
  if (a.segments == 1) {
    finish_row(a, row, first, second);
  } else {
    float* sum = a.sums + 2 * static_cast<int64_t>(item);
    sum[0] = first;
    sum[1] = second;
  }
}

__global__ void __launch_bounds__(kThreads) row_finish_kernel(const __grid_constant__ RowsArgs a) {
  const uint32_t row = blockIdx.x * kWarps + warp_of();
  if (row >= a.rows) return;  // a whole warp
  const float* sums = a.sums + 2 * static_cast<int64_t>(row) * a.segments;
  double first = 0.0, second = 0.0;
  for (uint32_t segment = lane_of(); segment < a.segments; segment += kWarp) {
    first += sums[2 * segment];
    second += sums[2 * segment + 1];
  }
  first = lanes_sum(first);
  second = lanes_sum(second);
  if (lane_of() == 0) finish_row(a, row, static_cast<float>(first), static_cast<float>(second));
}

uint32_t lanes_for(int64_t width) {
  uint32_t lanes = 1;
  while (lanes < kWarp && lanes * kVector < width) lanes *= 2;
  return lanes;
}

void run_rows(RowsArgs a, int64_t batch, const Target& target) {
  const LatentsView& latents = a.replay.latents;
  const int64_t segments = segments_of(latents.width), rows = batch * latents.rows_per_sample;
  a.rows = static_cast<uint32_t>(rows);
  a.segments = static_cast<uint32_t>(segments);
  a.lanes = lanes_for(latents.width);
  EDITR2_LAUNCH(row_sums_kernel, grid_of(ceil_div(rows * segments, kThreads / a.lanes)), kThreads, 0, target.stream,
                a);
  if (segments > 1) EDITR2_LAUNCH(row_finish_kernel, grid_of(ceil_div(rows, kWarps)), kThreads, 0, target.stream, a);
}

}  // namespace

int64_t workspace_bytes(int64_t batch, int64_t n, int64_t width, int renorm) {
  return workspace_of(nullptr, batch, n, width, renorm).bytes;
}

LatentsView prepare(const Latents& in, void* workspace, int64_t batch, const Target& target, Workspace& scratch) {
  check_sizes(batch, in.n);
  const bool any = batch * in.n > 0;
  LatentsView a = {};
  a.x = lanes_of(in.x, any, "x");
  a.v = lanes_of(in.v, any, "v");
  a.m_prev = lanes_of(in.m_prev, false, "m_prev");
  a.v_uncond = lanes_of(in.v_uncond, false, "v_uncond");
  a.v_uncond_image = lanes_of(in.v_uncond_image, false, "v_uncond_image");
  need(in.rows >= 0, "rows", in.rows, "a size >= 0");
  if (batch > 0) {
    need_pointer(in.table, "table");
    need_pointer(in.step_index, "step_index");
    need_workspace(workspace);
  }
  grid_of(batch * ceil_div(in.n, kChunk));
  a.guidance = in.guidance;
  a.table = in.table;
  a.step_index = in.step_index;
  a.rows = in.rows;
  a.n = in.n;
  a.chunks = static_cast<unsigned>(ceil_div(in.n, kChunk));
  a.renorm = in.guidance == nullptr ? static_cast<int>(kNoRenorm) : in.renorm;
  scratch = workspace_of(workspace, batch, in.n, in.width, in.renorm);
  if (a.renorm == kNoRenorm || !any) return a;
  a.width = static_cast<uint32_t>(a.renorm == kGlobal ? in.n : in.width);
  a.rows_per_sample = static_cast<uint32_t>(in.n / a.width);
  a.scales = scratch.scales;
  RowsArgs norms = {};
  norms.replay.latents = a;
  norms.sums = scratch.row_sums;
  run_rows(norms, batch, target);
  return a;
}

void fill_row_dots(const ReplayView& replay, const FactorsView& factors, const Workspace& scratch, int64_t batch,
                   const Target& target) {
  run_rows({replay, factors, scratch.row_sums, 0, 0, 0, true}, batch, target);
}

}  // namespace editr2::gpu
