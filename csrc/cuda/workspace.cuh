// How a call's scratch memory is divided.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace editr2::gpu {

// What renormalisation needs of one row (see guidance.h); filled in before the kernels that read it.
struct alignas(16) RowScale {
  float s, on_w, on_v, dot;
};

struct Workspace {
  float* partials;   // [B, chunks, up to kMaxMoments]
  float* moments;    // [B, kMaxMoments]
  RowScale* scales;  // [B, n / width]; null without renormalisation
  float* row_sums;   // [B, n / width, segments, 2], where a row has several segments
  int64_t bytes;
};

constexpr int64_t kSegment = 1024;  // elements of a row that one warp adds
inline int64_t segments_of(int64_t width) { return ceil_div(width, kSegment); }

inline Workspace workspace_of(void* memory, int64_t batch, int64_t n, int64_t width, int renorm) {
  check_sizes(batch, n);
  need(renorm >= kNoRenorm && renorm <= kGlobal, "renorm", renorm, "0 to 4");
  Workspace w = {};
  const auto take = [&w, memory](int64_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(w.bytes);
    w.bytes += ceil_div(bytes, 16) * 16;
    return reinterpret_cast<void*>(at);
  };
  w.partials = static_cast<float*>(take(batch * ceil_div(n, kChunk) * kMaxMoments * 4));
  w.moments = static_cast<float*>(take(batch * kMaxMoments * 4));
  if (renorm == kNoRenorm || batch * n == 0) return w;
  if (renorm == kGlobal) width = n;
  need(width >= 1 && n % width == 0, "width", width, "the size of the last dimension, a divisor of N");
  const int64_t rows = batch * (n / width), segments = segments_of(width);
  // Rows are counted and found in 32 bits: a 64-bit division is a subroutine call on a GPU.
  need(n <= INT32_MAX, "N", n, "at most 2^31 - 1 elements a sample with renormalisation");
  need(rows * segments <= INT32_MAX, "B", batch, "at most 2^31 - 1 rows to normalise");
  w.scales = static_cast<RowScale*>(take(rows * static_cast<int64_t>(sizeof(RowScale))));
  w.row_sums = static_cast<float*>(take(segments > 1 ? rows * segments * 8 : 0));
  return w;
}

// scratch.moments from scratch.partials, the sums of `count` moments over a sample's chunks.
void fill_moments(const Workspace& scratch, unsigned chunks, int count, int64_t n, int64_t batch, const Target& target);

inline void need_workspace(const void* memory) {
  need_pointer(memory, "workspace");
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  need(at % 16 == 0, "workspace", static_cast<int64_t>(at), "an address on 16 bytes");
}

}  // namespace editr2::gpu
