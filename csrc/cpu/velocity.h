// The guided velocity of one tile and its gradient. The tile is staged in buffers that stay in the
// cache, so that memory is passed once although a row's scale needs all of the row.
#pragma once

#include "../guidance.h"
#include "../transition.h"
#include "block.h"

namespace EDITR2_NS {

using editr2::BackwardArgs;
using editr2::kTile;
using editr2::Latents;
using editr2::RowSums;

EDITR2_HD Row row_of(const Latents& l, int64_t b) {
  return reinterpret_cast<const Row*>(l.table)[l.step_index[b]];
}

class Velocity {
 public:
  Velocity(const Latents& l, const Row& row, int64_t b, Range range)
      : l_(l),
        count_(range.end - range.begin),
        guide_(guide_at(l.guidance != nullptr ? l.guidance + 4 * b : nullptr, row.sigma)),
        v_(l.v, b, range.begin),
        uncond_(l.v_uncond, b, range.begin),
        uncond_image_(l.v_uncond_image, b, range.begin),
        text_(guide_.text != 1.0f),
        image_(guide_.image != 1.0f),
        text_channel_(l.renorm == kTextChannel) {
    if (l.row_sums != nullptr) long_row_ = l.row_sums + (b * (l.tiling.n / l.width) + range.begin / l.width);
  }

  bool active() const { return guide_.active; }

  // u, valid as long as this object. Without guidance it is v where it lies.
  Source values() {
    if (!guide_.active) return v_;
    if (l_.renorm == kNoRenorm) {
      blocks(0, count_, [&](int64_t i, int64_t valid) EDITR2_INLINE {
        F v[kVectors], u[kVectors];
        combine(i, valid, v, u);
      });
      return Source(scaled_);
    }
    rows([&](int64_t r, int64_t begin, int64_t end) EDITR2_INLINE {
      const Squares s = combine_row(begin, end);
      if (long_row_ == nullptr) rows_[r] = {s.v.in_pairs(), s.w.in_pairs(), 0.0f};
    });
    rows([&](int64_t r, int64_t begin, int64_t end) EDITR2_INLINE {
      const float s = renorm_scale(l_.renorm, row(r).v_squares, row(r).w_squares).s;
      blocks(begin, end, [&](int64_t i, int64_t valid) EDITR2_INLINE {
        F u[kVectors];
        load(Source(scaled_), i, valid, u);
        for (int n = 0; n < kVectors; ++n) u[n] = u[n] * s;
        if (text_channel_) toward(uncond_image_, image_, guide_.image, i, valid, u);
        store(Target(u_), i, valid, u);
      });
    });
    return Source(u_);
  }

  // Squares of v and of the vector that is scaled, over a tile of a long row.
  void squares(double* v_squares, double* w_squares) {
    const Squares s = combine_row(0, count_);
    *v_squares = s.v.in_order();
    *w_squares = s.w.in_order();
  }

  // After values(), for the gradient g to u: the product with the scaled vector over a tile.
  double dot(const float* g) { return products(g, 0, count_).in_order(); }

  // After values(): from the gradient g to u the gradients to what u is made of.
  void backward(const float* g, const Target& grad_v, const Target& grad_uncond,
                const Target& grad_uncond_image) {
    const float gi = guide_.image, gt = guide_.text;
    if (l_.renorm != kNoRenorm && long_row_ == nullptr)
      rows([&](int64_t r, int64_t begin, int64_t end) EDITR2_INLINE {
        rows_[r].dot = products(g, begin, end).in_pairs();
      });
    rows([&](int64_t r, int64_t begin, int64_t end) EDITR2_INLINE {
      Scale s = {1.0f, 0.0f, 0.0f};
      if (l_.renorm != kNoRenorm) {
        s = renorm_scale(l_.renorm, row(r).v_squares, row(r).w_squares);
        s.on_w = s.on_w * row(r).dot;
        s.on_v = s.on_v * row(r).dot;
      }
      blocks(begin, end, [&](int64_t i, int64_t valid) EDITR2_INLINE {
        F g_u[kVectors], to_text[kVectors], to_image[kVectors];
        load(Source(g), i, valid, g_u);
        // The renormalisation stands between the branches (text_channel) or after both.
        for (int n = 0; n < kVectors; ++n) to_text[n] = text_channel_ ? g_u[n] * gi : g_u[n];
        if (l_.renorm != kNoRenorm) {
          F w[kVectors];
          load(Source(scaled_), i, valid, w);
          for (int n = 0; n < kVectors; ++n) to_text[n] = to_text[n] * s.s - w[n] * s.on_w;
        }
        for (int n = 0; n < kVectors; ++n) to_image[n] = text_channel_ ? g_u[n] : to_text[n];
        if (!text_channel_)
          for (int n = 0; n < kVectors; ++n) to_text[n] = to_text[n] * gi;
        F out[kVectors];
        if (grad_v) {
          for (int n = 0; n < kVectors; ++n) out[n] = to_text[n] * gt;
          if (l_.renorm != kNoRenorm) {
            F v[kVectors];
            load(v_, i, valid, v);
            for (int n = 0; n < kVectors; ++n) out[n] = out[n] + v[n] * s.on_v;
          }
          store(grad_v, i, valid, out);
        }
        if (grad_uncond) {
          for (int n = 0; n < kVectors; ++n) out[n] = to_text[n] * (1.0f - gt);
          store(grad_uncond, i, valid, out);
        }
        if (grad_uncond_image) {
          for (int n = 0; n < kVectors; ++n) out[n] = to_image[n] * (1.0f - gi);
          store(grad_uncond_image, i, valid, out);
        }
      });
    });
  }

 private:
  struct Squares {
    Sums v, w;
  };

  // The vector that is scaled, before it is: staged and left in w.
  EDITR2_HD void combine(int64_t i, int64_t valid, F v[kVectors], F w[kVectors]) {
    load(v_, i, valid, v);
    for (int n = 0; n < kVectors; ++n) w[n] = v[n];
    toward(uncond_, text_, guide_.text, i, valid, w);
    if (!text_channel_) toward(uncond_image_, image_, guide_.image, i, valid, w);
    store(Target(scaled_), i, valid, w);
  }

  EDITR2_HD Squares combine_row(int64_t begin, int64_t end) {
    Squares s;
    blocks(begin, end, [&](int64_t i, int64_t valid) EDITR2_INLINE {
      F v[kVectors], w[kVectors];
      combine(i, valid, v, w);
      s.v.add_products(v, v, valid);
      s.w.add_products(w, w, valid);
    });
    return s;
  }

  EDITR2_HD void toward(const Source& base, bool wanted, float weight, int64_t i, int64_t valid,
                        F u[kVectors]) const {
    if (!wanted) return;
    F from[kVectors];
    load(base, i, valid, from);
    for (int n = 0; n < kVectors; ++n) u[n] = guided(from[n], u[n], weight);
  }

  EDITR2_HD Sums products(const float* g, int64_t begin, int64_t end) const {
    Sums sums;
    blocks(begin, end, [&](int64_t i, int64_t valid) EDITR2_INLINE {
      F g_u[kVectors], w[kVectors];
      load(Source(g), i, valid, g_u);
      load(Source(scaled_), i, valid, w);
      if (text_channel_)
        for (int n = 0; n < kVectors; ++n) g_u[n] = g_u[n] * guide_.image;
      sums.add_products(g_u, w, valid);
    });
    return sums;
  }

  // body(r, begin, end) for each row of the tile: the tile itself where there are none or it lies in one.
  template <class Body>
  EDITR2_HD void rows(const Body& body) const {
    const int64_t width = l_.renorm == kNoRenorm ? count_ : at_most(l_.width, count_);
    for (int64_t r = 0, begin = 0; begin < count_; ++r, begin += width) body(r, begin, begin + width);
  }
  EDITR2_HD const RowSums& row(int64_t r) const { return long_row_ != nullptr ? *long_row_ : rows_[r]; }

  const Latents& l_;
  const int64_t count_;
  const Guide guide_;
  const Source v_, uncond_, uncond_image_;
  const bool text_, image_, text_channel_;
  const RowSums* long_row_ = nullptr;  // of the row this tile lies in
  RowSums rows_[kTile];
  alignas(64) float scaled_[kTile];
  alignas(64) float u_[kTile];
};

}  // namespace EDITR2_NS
