// Scores -> advantages, one unit and one set at a time, for host and device. The numbered steps are those of
// editr2_kernels/group_advantage.py, which defines every rounding. fp32, no fused multiply-add; sums in int64 fixed
// point, so no order of samples, threads or blocks changes a bit.
#pragma once

#include <cstdint>

#include "philox.h"

namespace EDITR2_NS {

constexpr int64_t kMaxUnits = int64_t{1} << 20;  // a term is at most 2^40, so the int64 sum stays below 2^60

struct Aggregate {
  enum : int { kNone, kMean, kLast, kProduct, kPrefix };
};
struct Fusion {
  enum : int { kReward, kAdvantage, kGdpo };
};
struct Baseline {
  enum : int { kSession, kSessionTurn };
};
struct StdOver {
  enum : int { kGroup, kGlobal, kNone };
};

// The bits of |x|, which order like |x|, with infinities and then NaN above every number.
EDITR2_HD int32_t credit_size(float x) { return ScalarLanes::float_bits(x) & 0x7FFFFFFF; }
EDITR2_HD bool credit_finite(int32_t size) { return size < 0x7F800000; }
EDITR2_HD float credit_nan() { return ScalarLanes::bits_float(0x7FC00000); }

struct AdvantageArgs {
  const float* scores;     // [n, turns, rewards]
  const int64_t* group;    // [n]
  const float* weights;    // [rewards]
  const uint8_t* mask;     // [n, turns], null = all valid
  const uint8_t* applies;  // [n, turns, rewards], null = every reward applies
  int aggregate, fusion, baseline, std;
  bool unbiased;
  float eps;
  bool eps_floor;     // max(std, eps) rather than std + eps
  float clip;         // negative = none
  int filter_reward;  // -1 = none
  bool filter_in_statistics;
  float min_std;      // negative = keeps every set
  float max_mean;     // infinite = keeps every set
  float* advantage;   // [n, turns]
  uint8_t* mask_out;  // [n, turns]
  int64_t n, turns, rewards;

  EDITR2_HD bool per_turn() const { return aggregate == Aggregate::kNone; }
  EDITR2_HD int64_t units() const { return per_turn() ? n * turns : n; }
  EDITR2_HD int64_t columns() const { return fusion == Fusion::kReward ? 1 : rewards; }
  EDITR2_HD bool drops() const { return min_std >= 0.0f || credit_finite(credit_size(max_mean)); }
  EDITR2_HD int64_t divisor(int64_t count) const { return unbiased ? count - 1 : count; }
};

EDITR2_HD bool credit_valid(const AdvantageArgs& a, int64_t cell) { return a.mask == nullptr || a.mask[cell] != 0; }

EDITR2_HD bool credit_applies(const AdvantageArgs& a, int64_t cell, int64_t k) {
  return a.applies == nullptr || a.applies[cell * a.rewards + k] != 0;
}

// Step 2: the turn after which sample i no longer trains.
// nvcc would unroll these short loops into every place that calls them, which only makes the kernel large.
EDITR2_HD int64_t credit_last_live(const AdvantageArgs& a, int64_t i) {
  if (a.filter_reward >= 0)
#pragma unroll 1
    for (int64_t t = 0; t < a.turns; ++t) {
      const int64_t cell = i * a.turns + t;
      if (credit_valid(a, cell) && credit_applies(a, cell, a.filter_reward) &&
          a.scores[cell * a.rewards + a.filter_reward] == 0.0f)
        return t;
    }
  return a.turns;
}

EDITR2_HD bool credit_all_valid(const AdvantageArgs& a, int64_t i) {
  bool all = true;
#pragma unroll 1
  for (int64_t t = 0; t < a.turns; ++t) all = all && credit_valid(a, i * a.turns + t);
  return all;
}

// Step 1: a reward of weight other than 0 applies to the turn, or any where all weights are 0.
EDITR2_HD bool credit_judged(const AdvantageArgs& a, int64_t cell) {
  if (a.applies == nullptr) return true;
  bool any = false, weighty = false, weights = false;
#pragma unroll 1
  for (int64_t k = 0; k < a.rewards; ++k) {
    const bool applies = credit_applies(a, cell, k), counts = a.weights[k] != 0.0f;
    any = any || applies;
    weighty = weighty || (applies && counts);
    weights = weights || counts;
  }
  return weights ? weighty : any;
}
EDITR2_HD bool credit_any_judged(const AdvantageArgs& a, int64_t i) {
  if (a.applies == nullptr) return true;
  bool any = false;
#pragma unroll 1
  for (int64_t t = 0; t < a.turns; ++t) any = any || credit_judged(a, i * a.turns + t);
  return any;
}

// Step 5, before sets are dropped. A turn trains where its unit counts and it is live and judged.
EDITR2_HD bool credit_counted(const AdvantageArgs& a, int64_t i, int64_t t, int64_t last_live) {
  if (!a.per_turn()) return credit_all_valid(a, i) && credit_any_judged(a, i);
  const int64_t cell = i * a.turns + t;
  return credit_valid(a, cell) && (a.filter_in_statistics || t <= last_live) && credit_judged(a, cell);
}
EDITR2_HD bool credit_trained(const AdvantageArgs& a, int64_t i, int64_t t, int64_t last_live) {
  const int64_t cell = i * a.turns + t;
  return credit_valid(a, cell) && t <= last_live && (a.per_turn() || credit_all_valid(a, i)) && credit_judged(a, cell);
}

// Step 3, of some turns: a turn to which reward k does not apply leaves sums and products as they were.
EDITR2_HD bool credit_unit_applies(const AdvantageArgs& a, int64_t unit, int64_t k) {
  if (a.applies == nullptr) return true;
  if (a.per_turn()) return credit_applies(a, unit, k);
  bool any = false;
#pragma unroll 1
  for (int64_t t = 0; t < a.turns; ++t) any = any || credit_applies(a, unit * a.turns + t, k);
  return any;
}
EDITR2_HD float credit_partial_value(const AdvantageArgs& a, int64_t unit, int64_t k) {
  float last = 0.0f, product = 1.0f, sum = 0.0f, count = 0.0f;
#pragma unroll 1
  for (int64_t t = 0; t < a.turns; ++t) {
    const int64_t cell = unit * a.turns + t;
    if (!credit_applies(a, cell, k)) continue;
    last = a.scores[cell * a.rewards + k];
    product = product * last;
    sum = sum + (a.aggregate == Aggregate::kMean ? last : product);
    count = count + 1.0f;
  }
  if (a.aggregate == Aggregate::kLast) return last;
  return a.aggregate == Aggregate::kProduct ? product : sum / count;
}

// Step 3, of a unit to which reward k applies.
EDITR2_HD float credit_value(const AdvantageArgs& a, int64_t unit, int64_t k) {
  if (a.per_turn()) return a.scores[unit * a.rewards + k];
  if (a.applies != nullptr) return credit_partial_value(a, unit, k);
  const float* score = a.scores + unit * a.turns * a.rewards + k;
  if (a.aggregate == Aggregate::kLast) return score[(a.turns - 1) * a.rewards];
  float product = score[0], sum = score[0];
#pragma unroll 1
  for (int64_t t = 1; t < a.turns; ++t) {
    const float s = score[t * a.rewards];
    product = product * s;
    sum = sum + (a.aggregate == Aggregate::kMean ? s : product);
  }
  return a.aggregate == Aggregate::kProduct ? product : sum / static_cast<float>(a.turns);
}

// Steps 4 and 9: one term of the weighted sum over rewards, left to right, and what the sum is multiplied by. The sign
// of a sum that is 0 shows nowhere, so it may begin with 0 where the first reward does not apply.
EDITR2_HD float credit_fuse(const AdvantageArgs& a, int64_t k, float sum, float x) {
  const float term = a.weights[k] * x;
  return k == 0 ? term : sum + term;
}
EDITR2_HD float credit_share(const AdvantageArgs& a, int64_t unit) {
  float whole = 0.0f, heard = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < a.rewards; ++k) {
    const float size = ScalarLanes::bits_float(credit_size(a.weights[k]));
    whole = whole + size;
    if (credit_unit_applies(a, unit, k)) heard = heard + size;
  }
  return heard == whole ? 1.0f : whole / heard;
}
EDITR2_HD float credit_fused(const AdvantageArgs& a, int64_t unit) {
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < a.rewards; ++k)
    if (credit_unit_applies(a, unit, k)) sum = credit_fuse(a, k, sum, credit_value(a, unit, k));
  return a.applies == nullptr ? sum : sum * credit_share(a, unit);
}
EDITR2_HD float credit_column(const AdvantageArgs& a, int64_t unit, int64_t column) {
  return a.fusion == Fusion::kReward ? credit_fused(a, unit) : credit_value(a, unit, column);
}

// Which counted units count in a column.
EDITR2_HD bool credit_in_column(const AdvantageArgs& a, int64_t unit, int64_t column) {
  return a.fusion == Fusion::kReward || credit_unit_applies(a, unit, column);
}

// Step 6. The sum of a set is taken in units that follow from the size of its largest |x|.
EDITR2_HD int credit_exponent(int32_t size) {
  const int e = (size >> 23) - 126;
  return e < -80 ? -80 : e;
}
EDITR2_HD float credit_power(int exponent) { return ScalarLanes::bits_float((exponent + 127) << 23); }
EDITR2_HD float credit_scale(int32_t size) { return credit_power(40 - credit_exponent(size)); }

EDITR2_HD int64_t credit_fixed(float x, float scale) {  // rounds to even
#if defined(__CUDA_ARCH__)
  return __float2ll_rn(x * scale);
#else
  return static_cast<int64_t>(__builtin_llrintf(x * scale));
#endif
}

EDITR2_HD float credit_moment(int64_t sum, int64_t divisor, int32_t size) {
  if (!credit_finite(size)) return credit_nan();
  if (divisor <= 0) return 0.0f;
  const int64_t magnitude = sum < 0 ? -sum : sum;
  const int64_t rounded = (2 * magnitude + divisor) / (2 * divisor);
  return static_cast<float>(sum < 0 ? -rounded : rounded) * credit_power(credit_exponent(size) - 40);
}

// A set's least value and its mean above that: about it, scores far from 0 that hardly differ lose nothing.
struct Centre {
  float least, above;
};
EDITR2_HD float credit_above(float x, float least) { return x - least; }
EDITR2_HD float credit_deviation(const Centre& centre, float x) {
  const float y = credit_above(x, centre.least);
  return y - centre.above;
}
EDITR2_HD float credit_mean(const Centre& centre) { return centre.least + centre.above; }

// Steps 5b and 7.
EDITR2_HD bool credit_drops(const AdvantageArgs& a, const Centre& centre, float std) {
  return std <= a.min_std || credit_mean(centre) >= a.max_mean;
}
EDITR2_HD float credit_denominator(const AdvantageArgs& a, float std) {
  if (a.eps_floor) return std < a.eps ? a.eps : std;
  return std + a.eps;
}
EDITR2_HD float credit_normalise(float d, float denominator) { return denominator == 0.0f ? 0.0f : d / denominator; }

// Step 11.
EDITR2_HD float credit_finish(const AdvantageArgs& a, float x) {
  if (!credit_finite(credit_size(x))) return credit_nan();
  if (a.clip >= 0.0f) x = x > a.clip ? a.clip : x < -a.clip ? -a.clip : x;
  return x + 0.0f;
}

// need(condition, argument, given, accepted) throws naming the argument.
template <class Need>
void credit_check(const AdvantageArgs& a, const Need& need) {
  need(a.n >= 0, "N", a.n, "a size >= 0");
  need(a.turns >= 0, "T", a.turns, "a size >= 0");
  need(a.rewards >= 1, "K", a.rewards, "a size >= 1");
  need(a.turns == 0 || a.n <= kMaxUnits / a.turns, "N", a.n, "at most 2^20 / T samples");
  need(a.aggregate >= 0 && a.aggregate <= Aggregate::kPrefix, "aggregate", a.aggregate, "0 .. 4");
  need(a.fusion >= 0 && a.fusion <= Fusion::kGdpo, "fusion", a.fusion, "0 .. 2");
  need(a.baseline >= 0 && a.baseline <= Baseline::kSessionTurn, "baseline", a.baseline, "0 .. 1");
  need(a.std >= 0 && a.std <= StdOver::kNone, "std", a.std, "0 .. 2");
  need(a.baseline == Baseline::kSession || a.per_turn(), "baseline", a.baseline,
       "0 (session) unless aggregate is 0 (none)");
  need(a.filter_reward >= -1 && a.filter_reward < a.rewards, "filter_reward", a.filter_reward,
       "-1 (no filter) or the index of a reward");
  if (a.n * a.turns == 0) return;
  need(a.scores != nullptr, "scores", 0, "the address of a tensor");
  need(a.group != nullptr, "group", 0, "the address of a tensor");
  need(a.weights != nullptr, "weights", 0, "the address of a tensor");
  need(a.advantage != nullptr, "advantage", 0, "the address of a tensor");
  need(a.mask_out != nullptr, "mask_out", 0, "the address of a tensor");
}

}  // namespace EDITR2_NS
