#include "ops.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "../guidance.h"
#include "../objective.h"
#include "dispatch.h"
#include "pool.h"

namespace editr2 {
namespace {

// Starting and joining a team costs some ten microseconds, what one core needs for this many elements.
constexpr int64_t kElementsPerThread = 4 * kTile;

std::vector<double> partials(const Sizes& sizes, const Tiling& tiling) {
  return std::vector<double>(static_cast<size_t>(sizes.batch * tiling.tiles));
}

void check_sizes(const Sizes& s) {
  need(s.batch >= 0, "B", s.batch, "a size >= 0");
  need(s.n >= 0, "N", s.n, "a size >= 0");
  need(s.threads >= 1, "threads", s.threads, "at least 1");
  need(s.n == 0 || s.batch <= INT64_MAX / s.n, "B", s.batch, "a batch whose B * N fits 63 bits");
}

void check_pointer(const void* p, bool needed, const char* argument) {
  if (needed && p == nullptr) reject(argument, "pointer 0", "the address of a tensor");
}

void check_dtype(int dtype, const char* argument) {
  if (dtype < kFloat32 || dtype > kFloat16)
    reject(argument, "dtype code " + std::to_string(dtype), "0 (float32), 1 (bfloat16) or 2 (float16)");
}

void check_input(const Input& in, bool needed, const Sizes& s, const char* argument) {
  check_pointer(in.data, needed && s.batch * s.n > 0, argument);
  check_dtype(in.dtype, argument);
  if (in.stride < 0) reject(argument, "batch stride " + std::to_string(in.stride), "a stride >= 0");
}

void check_output(const Output& out, bool needed, const Sizes& s, const char* argument) {
  check_pointer(out.data, needed && s.batch * s.n > 0, argument);
  check_dtype(out.dtype, argument);
  if (out.data != nullptr && s.batch > 1 && out.stride < s.n)
    reject(argument, "batch stride " + std::to_string(out.stride), "a stride >= N: rows that do not overlap");
}

const Row& row_at(const Latents& l, int64_t b) {
  return reinterpret_cast<const Row*>(l.table)[l.step_index[b]];
}

Tiling plain_tiling(int64_t n) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  return {n, std::max<int64_t>(n, 1), std::max<int64_t>(tiles, 1), tiles};
}

// Fills in the tiling. The width of a `global` row is the sample.
void check_latents(Latents& l, const Sizes& s) {
  check_sizes(s);
  check_input(l.x, true, s, "x");
  check_input(l.v, true, s, "v");
  check_input(l.m_prev, false, s, "m_prev");
  check_input(l.v_uncond, false, s, "v_uncond");
  check_input(l.v_uncond_image, false, s, "v_uncond_image");
  need(s.rows >= 0, "rows", s.rows, "a size >= 0");
  need(l.renorm >= kNoRenorm && l.renorm <= kGlobal, "renorm", l.renorm, "0 .. 4");
  if (l.guidance == nullptr) l.renorm = kNoRenorm;
  if (l.renorm == kGlobal) l.width = s.n;
  l.tiling = plain_tiling(s.n);
  l.row_sums = nullptr;
  if (l.renorm != kNoRenorm && s.n > 0) {
    need(l.width >= 1 && s.n % l.width == 0, "width", l.width, "the width of rows that divide N");
    const bool fits = l.width <= kTile;
    const int64_t span = fits ? kTile / l.width * l.width : l.width;
    const int64_t per_span = (span + kTile - 1) / kTile;
    l.tiling = {s.n, span, per_span, (s.n + span - 1) / span * per_span};
  }
  if (s.batch == 0) return;
  check_pointer(l.table, true, "table");
  check_pointer(l.step_index, true, "step_index");
  for (int64_t b = 0; b < s.batch; ++b) {
    if (l.step_index[b] < 0 || l.step_index[b] >= s.rows)
      reject("step_index", std::to_string(l.step_index[b]) + " for sample " + std::to_string(b),
             ("0 <= step_index < " + std::to_string(s.rows) + ", the rows of the table").c_str());
    if (s.n == 0) continue;
    if (l.m_prev.data == nullptr && row_at(l, b).C != 0.0f)
      reject("m_prev", "none", "the x0 of the step before: a sample's table row has C != 0");
    if (l.guidance == nullptr) continue;
    const Guide guide = guide_at(l.guidance + 4 * b, row_at(l, b).sigma);
    check_pointer(l.v_uncond.data, guide.text != 1.0f, "v_uncond");
    check_pointer(l.v_uncond_image.data, guide.image != 1.0f, "v_uncond_image");
  }
}

void check_replay(ReplayArgs& a, const Sizes& s) {
  check_latents(a.latents, s);
  check_input(a.x_next, true, s, "x_next");
  check_input(a.v_ref, false, s, "v_ref");
  check_input(a.v_old, false, s, "v_old");
}

template <class Task>  // task(b, tile, flat index)
void for_tiles(const Sizes& s, const Tiling& tiling, const Task& task) {
  const int64_t count = s.batch * tiling.tiles;
  const bool repays = s.batch * tiling.n >= 2 * kElementsPerThread;
  parallel_for(count, repays ? s.threads : 1,
               [&](int64_t i) { task(i / tiling.tiles, i % tiling.tiles, i); });
}

// Means over the samples from their tiles' partial sums, added in order; NaN for an empty sample.
template <class Part>
float mean_of(int64_t b, const Tiling& tiling, const Part& part) {
  double sum = 0.0;
  for (int64_t t = 0; t < tiling.tiles; ++t) sum += part(static_cast<size_t>(b * tiling.tiles + t));
  return static_cast<float>(sum / static_cast<double>(tiling.n));
}

// Rows longer than a tile need their sums before any of their tiles can be done.
struct LongRows {
  std::vector<RowSums> sums;
  int64_t tiles_per_row = 0;

  LongRows(Latents& l, const Kernels& k, const Sizes& s) {
    if (l.renorm == kNoRenorm || l.width <= kTile) return;
    tiles_per_row = l.tiling.tiles_per_span;
    std::vector<double> v = partials(s, l.tiling), w = partials(s, l.tiling);
    for_tiles(s, l.tiling, [&](int64_t b, int64_t t, int64_t i) {
      k.row_squares(l, b, t, &v[static_cast<size_t>(i)], &w[static_cast<size_t>(i)]);
    });
    sums.resize(v.size() / static_cast<size_t>(tiles_per_row));
    for (size_t row = 0; row < sums.size(); ++row)
      sums[row] = {row_total(v, row), row_total(w, row), 0.0f};
    l.row_sums = sums.data();
  }

  void add_dots(const BackwardArgs& a, const Kernels& k, const Sizes& s) {
    if (sums.empty()) return;
    const Tiling& tiling = a.replay.latents.tiling;
    std::vector<double> dots = partials(s, tiling);
    for_tiles(s, tiling, [&](int64_t b, int64_t t, int64_t i) {
      dots[static_cast<size_t>(i)] = k.row_dot(a, b, t);
    });
    for (size_t row = 0; row < sums.size(); ++row) sums[row].dot = row_total(dots, row);
  }

 private:
  float row_total(const std::vector<double>& parts, size_t row) const {
    double sum = 0.0;
    const size_t count = static_cast<size_t>(tiles_per_row);
    for (size_t t = 0; t < count; ++t) sum += parts[row * count + t];
    return static_cast<float>(sum);
  }
};

struct ReplayMeans {
  float z2, ref2, old2;
};
std::vector<ReplayMeans> replay_means(ReplayArgs& a, const Sizes& s) {
  const Kernels& k = active_kernels();
  const LongRows rows(a.latents, k, s);
  const Tiling& tiling = a.latents.tiling;
  std::vector<Moments> parts(static_cast<size_t>(s.batch * tiling.tiles));
  for_tiles(s, tiling, [&](int64_t b, int64_t t, int64_t i) {
    parts[static_cast<size_t>(i)] = k.replay(a, b, t);
  });
  std::vector<ReplayMeans> means;
  for (int64_t b = 0; b < s.batch; ++b)
    means.push_back({mean_of(b, tiling, [&](size_t i) { return parts[i].z; }),
                     a.v_ref.data == nullptr ? 0.0f : mean_of(b, tiling, [&](size_t i) { return parts[i].ref; }),
                     a.v_old.data == nullptr ? 0.0f : mean_of(b, tiling, [&](size_t i) { return parts[i].old; })});
  return means;
}

float log_prob_of(const Row& row, float mean_square) {
  const float scaled = row.w * mean_square;
  return scaled + row.c;
}

bool counts(const uint8_t* mask, int64_t b) { return mask == nullptr || mask[b] != 0; }

int64_t samples_that_count(const uint8_t* mask, int64_t batch) {
  int64_t count = 0;
  for (int64_t b = 0; b < batch; ++b) count += counts(mask, b);
  return count;
}

float weight_of(float normalizer, int64_t counted) {
  return 1.0f / (normalizer > 0.0f ? normalizer : static_cast<float>(std::max<int64_t>(counted, 1)));
}

}  // namespace

void reject(const char* argument, const std::string& given, const char* accepted) {
  throw std::invalid_argument(std::string(argument) + ": got " + given + ", accepted: " + accepted);
}

void need(bool condition, const char* argument, int64_t given, const char* accepted) {
  if (!condition) reject(argument, std::to_string(given), accepted);
}

void philox_normal(NormalArgs a, const Sizes& s) {
  check_sizes(s);
  check_output(a.out, true, s, "out");
  check_pointer(a.seed, s.batch > 0, "seed");
  check_pointer(a.step, s.batch > 0, "step");
  a.tiling = plain_tiling(s.n);
  const Kernels& k = active_kernels();
  for_tiles(s, a.tiling, [&](int64_t b, int64_t t, int64_t) { k.normal(a, b, t); });
}

void sde_step(StepArgs a, float* log_prob, const Sizes& s) {
  check_latents(a.latents, s);
  check_input(a.noise, false, s, "noise");
  check_output(a.x_next, true, s, "x_next");
  check_output(a.x0, false, s, "x0");
  check_pointer(a.seed, s.batch > 0 && a.noise.data == nullptr, "seed");
  const Kernels& k = active_kernels();
  const LongRows rows(a.latents, k, s);
  const Tiling& tiling = a.latents.tiling;
  std::vector<double> squares = partials(s, tiling);
  for_tiles(s, tiling, [&](int64_t b, int64_t t, int64_t i) {
    squares[static_cast<size_t>(i)] = k.step(a, b, t);
  });
  if (log_prob == nullptr) return;
  for (int64_t b = 0; b < s.batch; ++b)
    log_prob[b] = log_prob_of(row_at(a.latents, b), mean_of(b, tiling, [&](size_t i) { return squares[i]; }));
}

void sde_log_prob(ReplayArgs a, float* log_prob, float* mean_diff, const Sizes& s) {
  check_replay(a, s);
  const std::vector<ReplayMeans> means = replay_means(a, s);
  for (int64_t b = 0; b < s.batch; ++b) {
    const ReplayMeans& m = means[static_cast<size_t>(b)];
    if (log_prob != nullptr) log_prob[b] = log_prob_of(row_at(a.latents, b), m.z2);
    if (mean_diff != nullptr) mean_diff[b] = m.ref2;
  }
}

void grpo_loss(GrpoArgs a, const Sizes& s) {
  check_replay(a.replay, s);
  need(a.kl_scale >= kStep && a.kl_scale <= kVelocity, "kl_scale", a.kl_scale, "0 .. 3");
  check_pointer(a.replay.v_old.data, a.guard && s.batch * s.n > 0, "v_old");
  check_pointer(a.old_log_prob, s.batch > 0, "old_log_prob");
  check_pointer(a.advantage, s.batch > 0, "advantage");
  check_pointer(a.log_prob, s.batch > 0, "log_prob");
  check_pointer(a.ratio, s.batch > 0, "ratio");
  check_pointer(a.kl, s.batch > 0, "kl");
  check_pointer(a.factors, s.batch > 0, "factors");
  check_pointer(a.loss, true, "loss");
  check_pointer(a.metrics, true, "metrics");
  a.replay.plain_ref = a.kl_scale == kVelocity;
  const std::vector<ReplayMeans> means = replay_means(a.replay, s);
  const GrpoOptions options = {a.clip_low, a.clip_high, a.advantage_clip, a.kl_weight, a.kl_scale, a.guard};
  const int64_t counted = samples_that_count(a.mask, s.batch);
  const float weight = weight_of(a.normalizer, counted);
  double loss = 0.0, sums[8] = {};
  for (int64_t b = 0; b < s.batch; ++b) {
    const ReplayMeans& m = means[static_cast<size_t>(b)];
    const bool counts_here = counts(a.mask, b);
    const GrpoSample g =
        grpo_sample(row_at(a.replay.latents, b), s.n, m.z2, m.ref2, a.replay.v_ref.data != nullptr, m.old2,
                    a.old_log_prob[b], a.advantage[b], counts_here ? weight : 0.0f, options);
    a.log_prob[b] = g.log_prob;
    a.ratio[b] = g.ratio;
    a.kl[b] = g.kl;
    a.factors[3 * b] = g.factors.on_z;
    a.factors[3 * b + 1] = g.factors.on_ref;
    a.factors[3 * b + 2] = g.factors.on_old;
    if (!counts_here) continue;
    const float total = g.policy + a.kl_weight * g.kl;
    const float deviation = std::fabs(g.ratio - 1.0f);
    loss += static_cast<double>(weight * total);
    sums[kRatioMean] += static_cast<double>(g.ratio);
    if (deviation > sums[kRatioMaxDeviation] || deviation != deviation)  // NaN comes in, and stays
      sums[kRatioMaxDeviation] = static_cast<double>(deviation);
    sums[kClipFractionLow] += g.ratio < 1.0f - a.clip_low;
    sums[kClipFractionHigh] += g.ratio > 1.0f + a.clip_high;
    sums[kApproxKl] += static_cast<double>(g.log_ratio * g.log_ratio * 0.5f);
    sums[kKl] += static_cast<double>(g.kl);
    sums[kPolicyLoss] += static_cast<double>(g.policy);
    if (!is_finite(total)) sums[kNonFinite] = 1.0;
  }
  a.loss[0] = static_cast<float>(loss);
  for (int i = 0; i < 8; ++i) {
    const bool mean = i != kRatioMaxDeviation && i != kNonFinite;
    a.metrics[i] = static_cast<float>(mean && counted > 0 ? sums[i] / static_cast<double>(counted) : sums[i]);
  }
}

void replay_backward(BackwardArgs a, const FactorArgs& from, const Sizes& s) {
  check_replay(a.replay, s);
  check_output(a.grad_v, false, s, "grad_v");
  check_output(a.grad_v_uncond, false, s, "grad_v_uncond");
  check_output(a.grad_v_uncond_image, false, s, "grad_v_uncond_image");
  std::vector<float> factors;
  for (int64_t b = 0; b < s.batch; ++b) {
    if (from.factors != nullptr) {
      const float scale = from.scale != nullptr ? *from.scale : 1.0f;
      for (int i = 0; i < 3; ++i) factors.push_back(scaled_factor(from.factors[3 * b + i], scale));
    } else {
      const GradientScale g = gradient_scale(
          row_at(a.replay.latents, b), from.grad_log_prob != nullptr ? from.grad_log_prob[b] : 0.0f,
          from.grad_mean_diff != nullptr ? from.grad_mean_diff[b] : 0.0f, std::max<int64_t>(s.n, 1));
      factors.insert(factors.end(), {g.on_z, g.on_diff, 0.0f});
    }
    const auto last = factors.end() - 3;
    check_pointer(a.replay.v_ref.data, s.n > 0 && last[1] != 0.0f, "v_ref");
    check_pointer(a.replay.v_old.data, s.n > 0 && last[2] != 0.0f, "v_old");
  }
  a.factors = factors.data();
  const Kernels& k = active_kernels();
  LongRows rows(a.replay.latents, k, s);
  rows.add_dots(a, k, s);
  for_tiles(s, a.replay.latents.tiling, [&](int64_t b, int64_t t, int64_t) { k.backward(a, b, t); });
}

namespace {

void check_nft(NftArgs& a, const Sizes& s) {
  check_sizes(s);
  check_input(a.x0, true, s, "x0");
  check_input(a.noise, true, s, "noise");
  check_input(a.v, true, s, "v");
  check_input(a.v_old, true, s, "v_old");
  check_input(a.v_ref, false, s, "v_ref");
  a.tiling = plain_tiling(s.n);
}

}  // namespace

void nft_loss(NftLossArgs a, const Sizes& s) {
  check_nft(a.nft, s);
  check_pointer(a.sigma, s.batch > 0, "sigma");
  check_pointer(a.r, s.batch > 0, "r");
  check_pointer(a.factors, s.batch > 0, "factors");
  check_pointer(a.loss, true, "loss");
  check_pointer(a.metrics, true, "metrics");
  const Kernels& k = active_kernels();
  const Tiling& tiling = a.nft.tiling;
  std::vector<NftSums> parts(static_cast<size_t>(s.batch * tiling.tiles));
  for_tiles(s, tiling, [&](int64_t b, int64_t t, int64_t i) {
    parts[static_cast<size_t>(i)] = k.nft(a.nft, b, t);
  });
  const NftOptions options = {a.nft.beta, a.advantage_max, a.ref_weight, a.min_weight};
  const int64_t counted = samples_that_count(a.mask, s.batch);
  const float weight = weight_of(a.normalizer, counted);
  double loss = 0.0, sums[5] = {};
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto mean = [&](double NftSums::* field) {
      return mean_of(b, tiling, [&](size_t i) { return parts[i].*field; });
    };
    const NftMoments m = {mean(&NftSums::positive_abs), mean(&NftSums::positive_square),
                          mean(&NftSums::negative_abs), mean(&NftSums::negative_square),
                          mean(&NftSums::ref_square)};
    const bool counts_here = counts(a.mask, b);
    const NftSample g = nft_sample(m, a.nft.v_ref.data != nullptr, a.sigma[b], a.r[b], s.n,
                                   counts_here ? weight : 0.0f, options);
    a.factors[3 * b] = g.on_positive;
    a.factors[3 * b + 1] = g.on_negative;
    a.factors[3 * b + 2] = g.on_ref;
    if (!counts_here) continue;
    const float total = g.policy + a.ref_weight * g.reference;
    loss += static_cast<double>(weight * total);
    sums[kNftPolicyLoss] += static_cast<double>(g.policy);
    sums[kNftPositive] += static_cast<double>(g.positive);
    sums[kNftNegative] += static_cast<double>(g.negative);
    sums[kNftReference] += static_cast<double>(g.reference);
    if (!is_finite(total)) sums[kNftNonFinite] = 1.0;
  }
  a.loss[0] = static_cast<float>(loss);
  for (int i = 0; i < 5; ++i)
    a.metrics[i] = static_cast<float>(
        i != kNftNonFinite && counted > 0 ? sums[i] / static_cast<double>(counted) : sums[i]);
}

void nft_loss_backward(NftArgs a, const float* factors, const float* scale, const Sizes& s) {
  check_nft(a, s);
  check_output(a.grad_v, true, s, "grad_v");
  check_pointer(factors, s.batch > 0, "factors");
  std::vector<float> scaled;
  for (int64_t i = 0; i < 3 * s.batch; ++i) {
    scaled.push_back(scaled_factor(factors[i], scale != nullptr ? *scale : 1.0f));
    check_pointer(a.v_ref.data, s.n > 0 && i % 3 == 2 && scaled.back() != 0.0f, "v_ref");
  }
  a.factors = scaled.data();
  const Kernels& k = active_kernels();
  for_tiles(s, a.tiling, [&](int64_t b, int64_t t, int64_t) { k.nft_backward(a, b, t); });
}

}  // namespace editr2
