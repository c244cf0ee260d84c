// Renormalisation's passes before the others: the scale of every row from its norms and, for the backward
// pass, the dot product of every row.
//
// A row is cut into segments of kSegment elements; a power of two of neighbouring lanes, one for each 8
// elements up to a warp, adds one segment. Rows of several segments (`global`) are finished by a second
// launch, a warp a row. Both the cut and the trees depend on the row's width alone.
#include "replay.cuh"

namespace editr2::gpu {
namespace {

constexpr uint32_t kRowsALane = 4;  // rows that a group of lanes adds one after another, and then finishes side by side

struct RowsArgs {
  ReplayView replay;    // norms: only its latents
  FactorsView factors;  // dots only
  float* sums;          // [B * rows_per_sample, segments, 2]
  uint32_t rows, segments, lanes;
  uint32_t at_once;  // rows of a group of lanes: kRowsALane, or 1 where rows have several segments or groups few lanes
};

template <bool kDots>
__device__ __forceinline__ void finish_row(const RowsArgs& a, uint32_t row, float first, float second) {
  RowScale* scale = a.replay.latents.scales + row;
  if (kDots) {
    scale->dot = first;
  } else {
    const Scale made = renorm_scale(a.replay.latents.renorm, first, second);
    *scale = {made.s, made.on_w, made.on_v, 0.0f};
  }
}

// Adds what the elements of one thread contribute to the squares of v and w, or to the dot product.
template <bool kDots>
__device__ __forceinline__ void add8(const RowsArgs& a, const Sample& s, const Factors& f, const Span& at, bool wide,
                                     float sums[2]) {
  const LatentsView& latents = a.replay.latents;
  Velocity q;
  velocity8(latents, s, at, wide, q);
  float first[kVector], second[kVector];
  if (kDots) {
    gradient8(a.replay, s, f, at, wide, q.u, first);
    const float image = latents.renorm == kTextChannel ? s.guide.image : 1.0f;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float h = image * first[k];
      first[k] = k < at.valid ? q.w[k] * h : 0.0f;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      first[k] = k < at.valid ? q.v[k] * q.v[k] : 0.0f;
      second[k] = k < at.valid ? q.w[k] * q.w[k] : 0.0f;
    }
    sums[1] += sum8(second);
  }
  sums[0] += sum8(first);
}

// A group of lanes adds its rows in turn; lane j of it keeps the sums of the j-th. What is of the sample is read once
// for all of them, and the roots and divisions that end a row are made for several rows by one instruction.
template <bool kDots>
__device__ __forceinline__ void add_rows(const RowsArgs& a) {
  const uint32_t lane = threadIdx.x % a.lanes, group = blockIdx.x * (kThreads / a.lanes) + threadIdx.x / a.lanes;
  const uint32_t first_item = group * a.at_once;
  const LatentsView& latents = a.replay.latents;
  uint32_t row = first_item / a.segments, segment = first_item - row * a.segments;
  uint32_t b = row / latents.rows_per_sample, at_row = row - b * latents.rows_per_sample;
  Sample s = {};
  Factors f = {};
  bool known = false, counts = false, mine_counts = false;
  float mine[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (uint32_t j = 0; j < a.at_once; ++j, ++row, ++at_row) {  // no early end: the lanes of a warp meet in the sums
    float sums[2] = {0.0f, 0.0f};
    const bool inside = row < a.rows;
    if (at_row == latents.rows_per_sample) at_row = 0, ++b, known = false;
    if (inside && !known) {
      known = true;
      s = sample_at(latents, b);
      if (!kDots) s.scales = nullptr;  // they are what is being made
      if (kDots) f = factors_at(a.factors, b);
      counts = s.guide.active && !(kDots && all_zero(f));
    }
    if (inside && counts) {
      const uint32_t start = at_row * latents.width;
      const uint32_t end = segment + 1 < a.segments ? (segment + 1) * kSegment : latents.width;
#pragma unroll 1
      for (uint32_t at = segment * kSegment + lane * kVector; at < end; at += a.lanes * kVector) {
        const int valid = end - at >= kVector ? kVector : static_cast<int>(end - at);
        add8<kDots>(a, s, f, {b, start + at, valid}, latents.width % kVector == 0, sums);
      }
    }
    sums[0] = lanes_sum(sums[0], a.lanes);
    if (!kDots) sums[1] = lanes_sum(sums[1], a.lanes);
    if (lane == j) mine[0] = sums[0], mine[1] = sums[1], mine_counts = inside && counts;
  }
  if (!mine_counts) return;
  if (a.segments == 1) {
    finish_row<kDots>(a, first_item + lane, mine[0], mine[1]);
  } else {
    float* sum = a.sums + 2 * static_cast<int64_t>(first_item);
    sum[0] = mine[0];
    sum[1] = mine[1];
  }
}

__global__ void __launch_bounds__(kThreads) row_norms_kernel(const __grid_constant__ RowsArgs a) { add_rows<false>(a); }
// Three blocks a multiprocessor: left alone, ptxas squeezes it into 64 registers for sm_100 and spills.
__global__ void __launch_bounds__(kThreads, 3) row_dots_kernel(const __grid_constant__ RowsArgs a) { add_rows<true>(a); }

template <bool kDots>
__device__ __forceinline__ void finish_rows(const RowsArgs& a) {
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
  if (lane_of() == 0) finish_row<kDots>(a, row, static_cast<float>(first), static_cast<float>(second));
}

__global__ void __launch_bounds__(kThreads) norms_finish_kernel(const __grid_constant__ RowsArgs a) {
  finish_rows<false>(a);
}
__global__ void __launch_bounds__(kThreads) dots_finish_kernel(const __grid_constant__ RowsArgs a) {
  finish_rows<true>(a);
}

uint32_t lanes_for(int64_t width) {
  uint32_t lanes = 1;
  while (lanes < kWarp && lanes * kVector < width) lanes *= 2;
  return lanes;
}

void run_rows(bool dots, RowsArgs a, int64_t batch, const Target& target) {
  const LatentsView& latents = a.replay.latents;
  const int64_t segments = segments_of(latents.width), rows = batch * latents.rows_per_sample;
  a.rows = static_cast<uint32_t>(rows);
  a.segments = static_cast<uint32_t>(segments);
  a.lanes = lanes_for(latents.width);
  a.at_once = segments == 1 && a.lanes >= kRowsALane ? kRowsALane : 1;
  const int64_t groups = ceil_div(rows * segments, a.at_once), blocks = ceil_div(groups, kThreads / a.lanes);
  if (dots)
    EDITR2_LAUNCH(row_dots_kernel, grid_of(blocks), kThreads, 0, target.stream, a);
  else
    EDITR2_LAUNCH(row_norms_kernel, grid_of(blocks), kThreads, 0, target.stream, a);
  if (segments == 1) return;
  if (dots)
    EDITR2_LAUNCH(dots_finish_kernel, grid_of(ceil_div(rows, kWarps)), kThreads, 0, target.stream, a);
  else
    EDITR2_LAUNCH(norms_finish_kernel, grid_of(ceil_div(rows, kWarps)), kThreads, 0, target.stream, a);
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
  run_rows(false, norms, batch, target);
  return a;
}

void fill_row_dots(const ReplayView& replay, const FactorsView& factors, const Workspace& scratch, int64_t batch,
                   const Target& target) {
  run_rows(true, {replay, factors, scratch.row_sums, 0, 0, 0, 0}, batch, target);
}

}  // namespace editr2::gpu
