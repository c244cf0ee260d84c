// Classifier-free guidance with renormalisation, for host and device: what every kernel that reads a
// velocity does before the transition. Two nested branches (text, then image) and one scale a row:
//
//     t = v_text  + g_text  (v - v_text)          skipped, t = v, where g_text is 1
//     u = v_image + g_image (t - v_image)         skipped, u = t, where g_image is 1
//     token, channel, global: u <- s u, the norms over v and u      text_channel: t <- s t, before u
//
// s = |v| / |u| for `token`; min(1, |v| / (|u| + 1e-8)) for the others. A row is one token (the last
// dimension) or, for `global`, the whole sample. Outside the guidance interval, and where both weights
// are 1, u = v exactly and there is no renormalisation. Products and sums round separately.
#pragma once

#include "philox.h"

namespace EDITR2_NS {

enum Renorm : int { kNoRenorm = 0, kToken = 1, kTextChannel = 2, kChannel = 3, kGlobal = 4 };

// The weights of one sample at noise level `sigma`; `entry` is its row of guidance[B, 4] (text, image,
// low, high), null for none. Guidance applies for low < sigma <= high.
struct Guide {
  float text, image;
  bool active;
};
EDITR2_HD Guide guide_at(const float* entry, float sigma) {
  Guide g = {1.0f, 1.0f, false};
  if (entry != nullptr && sigma > entry[2] && sigma <= entry[3]) {
    g.text = entry[0];
    g.image = entry[1];
    g.active = g.text != 1.0f || g.image != 1.0f;
  }
  return g;
}

template <class F>
EDITR2_HD F guided(F base, F v, float weight) {
  const F difference = v - base;
  const F step = difference * weight;
  return base + step;
}

// The scale of a row from the squared norms of v and of the vector that is scaled, and what its
// gradient needs: with `w` the scaled vector, `g` the gradient to s w and dot = sum(w g) over the row,
//     to w:  s g - on_w dot w          to v:  on_v dot v
struct Scale {
  float s, on_w, on_v;
};
constexpr float kNoSquares = 1e-30f;  // squares below count as 0: the quotients by their roots would overflow
EDITR2_HD Scale renorm_scale(int renorm, float v_squares, float w_squares) {
  v_squares = v_squares < kNoSquares ? 0.0f : v_squares;
  w_squares = w_squares < kNoSquares ? 0.0f : w_squares;
  const float v_norm = ScalarLanes::sqrt(v_squares), w_norm = ScalarLanes::sqrt(w_squares);
  const float base = renorm == kToken ? w_norm : w_norm + 1e-8f;
  if (!(base != 0.0f)) return {1.0f, 0.0f, 0.0f};
  const float s = v_norm / base;
  if (renorm != kToken && s > 1.0f) return {1.0f, 0.0f, 0.0f};
  const float on_w = w_norm > 0.0f ? s / base / w_norm : 0.0f;
  const float on_v = v_norm > 0.0f ? 1.0f / v_norm / base : 0.0f;
  return {s, on_w, on_v};
}

}  // namespace EDITR2_NS
