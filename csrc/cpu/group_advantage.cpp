// The numbered steps are those of editr2_kernels/group_advantage.py, which defines every rounding.
// Sums are taken in int64 fixed point, so the result is the same bits for any order of the samples.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops.h"

namespace editr2 {
namespace {

constexpr int64_t kMaxUnits = int64_t{1} << 20;

// Running extremes, then the fixed-point sum, of one set. Values that overflowed fp32 make it NaN.
struct Moment {
  int64_t count = 0;
  bool finite = true;
  float low = 0, high = 0, magnitude = 0;
  int exponent = 0;
  int64_t sum = 0;

  void observe(float x) {
    low = count == 0 ? x : std::min(low, x);
    high = count == 0 ? x : std::max(high, x);
    magnitude = std::max(magnitude, std::fabs(x));
    finite = finite && std::isfinite(x);
    ++count;
  }
  void fix_exponent() {
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent, -80);
  }
  void add(float x) {
    if (finite) sum += static_cast<int64_t>(std::rint(x * std::ldexp(1.0f, 40 - exponent)));
  }

  float value(int64_t divisor) const {
    if (!finite) return std::numeric_limits<float>::quiet_NaN();
    if (divisor <= 0) return 0.0f;
    const int64_t rounded = (2 * std::abs(sum) + divisor) / (2 * divisor);
    return static_cast<float>(sum < 0 ? -rounded : rounded) * std::ldexp(1.0f, exponent - 40);
  }
  float mean() const { return finite && low == high ? high : value(count); }
};

struct Unit {
  int64_t set;
  float value;
  float advantage;
  bool counted;
};

// Moments of f(unit) over the counted units of each set (all in one when `together`).
template <class Function>
std::vector<Moment> moments(const std::vector<Unit>& units, int64_t sets, bool together,
                            const Function& f) {
  std::vector<Moment> result(static_cast<size_t>(together ? 1 : sets));
  const auto of = [&](const Unit& u) -> Moment& {
    return result[static_cast<size_t>(together ? 0 : u.set)];
  };
  for (const Unit& u : units)
    if (u.counted) of(u).observe(f(u));
  for (Moment& m : result) m.fix_exponent();
  for (const Unit& u : units)
    if (u.counted) of(u).add(f(u));
  return result;
}

float square(float x) { return x * x; }

void normalise(std::vector<Unit>& units, int64_t sets, const AdvantageArgs& a) {  // step 7
  const auto value = [](const Unit& u) { return u.value; };
  const std::vector<Moment> means = moments(units, sets, false, value);
  std::vector<float> centre(means.size());
  for (size_t s = 0; s < means.size(); ++s) centre[s] = means[s].mean();
  const auto divisor = [&](int64_t count) { return a.unbiased ? count - 1 : count; };

  const bool global = a.std == 1;
  std::vector<float> denominator(global ? 1 : means.size(), 1.0f);
  if (a.std != 2) {
    std::vector<Moment> squares;
    if (global) {
      const float g = moments(units, sets, true, value)[0].mean();
      squares = moments(units, sets, true, [&](const Unit& u) { return square(u.value - g); });
    } else {
      squares = moments(units, sets, false, [&](const Unit& u) {
        return square(u.value - centre[static_cast<size_t>(u.set)]);
      });
    }
    for (size_t s = 0; s < squares.size(); ++s)
      denominator[s] = std::sqrt(squares[s].value(divisor(squares[s].count))) + a.eps;
  }

  for (Unit& u : units) {
    const size_t s = static_cast<size_t>(u.set);
    u.advantage = 0.0f;
    if (!u.counted) continue;
    const float d = u.value - centre[s];
    const float scale = denominator[global ? 0 : s];
    if (a.std == 2)
      u.advantage = d;
    else if (!(scale <= 0.0f))
      u.advantage = d / scale;
  }
}

float aggregate(const float* score, int64_t turns, int64_t stride, int how) {  // step 3
  if (how == 2) return score[(turns - 1) * stride];
  float product = score[0], sum = score[0];
  for (int64_t t = 1; t < turns; ++t) {
    const float s = score[t * stride];
    product = product * s;
    sum = sum + (how == 1 ? s : product);
  }
  return how == 3 ? product : sum / static_cast<float>(turns);
}

void check(const AdvantageArgs& a) {
  const auto code = [](int value, int last, const char* name) {
    need(value >= 0 && value <= last, name, value, ("0 .. " + std::to_string(last)).c_str());
  };
  need(a.n >= 0, "N", a.n, "a size >= 0");
  need(a.turns >= 0, "T", a.turns, "a size >= 0");
  need(a.rewards >= 1, "K", a.rewards, "a size >= 1");
  need(a.turns == 0 || a.n <= kMaxUnits / a.turns, "N", a.n, "at most 2^20 / T samples");
  code(a.aggregate, 4, "aggregate");
  code(a.fusion, 1, "fusion");
  code(a.baseline, 1, "baseline");
  code(a.std, 2, "std");
  need(a.broadcast == (a.aggregate != 0), "broadcast", a.broadcast,
       "true exactly when aggregate is not 0 (none)");
  need(a.baseline == 0 || a.aggregate == 0, "baseline", a.baseline,
       "0 (session) unless aggregate is 0 (none)");
  need(a.filter_reward >= -1 && a.filter_reward < a.rewards, "filter_reward", a.filter_reward,
       "-1 (no filter) or the index of a reward");
  if (a.n * a.turns == 0) return;
  const auto present = [](const void* p, const char* name) {
    if (p == nullptr) reject(name, "0", "the address of a tensor");
  };
  present(a.scores, "scores_ptr");
  present(a.group, "group_ptr");
  present(a.weights, "weights_ptr");
  present(a.advantage, "advantage_ptr");
  present(a.mask_out, "mask_out_ptr");
}

}  // namespace

void group_advantage(const AdvantageArgs& a) {
  check(a);
  const int64_t n = a.n, turns = a.turns, rewards = a.rewards;
  if (n * turns == 0) return;
  const auto valid = [&](int64_t cell) { return a.mask == nullptr || a.mask[cell] != 0; };
  const bool per_turn = a.aggregate == 0;

  // Sets: group ids in sorted order, times turns where every turn has its own baseline.
  std::vector<int64_t> ids(a.group, a.group + n);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  const int64_t sets_per_group = per_turn && a.baseline == 1 ? turns : 1;
  const int64_t sets = static_cast<int64_t>(ids.size()) * sets_per_group;

  // Steps 1, 2 and 5: which units count, which turns train.
  std::vector<Unit> units(static_cast<size_t>(per_turn ? n * turns : n));
  std::vector<uint8_t> trained(static_cast<size_t>(n * turns));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t set =
        (std::lower_bound(ids.begin(), ids.end(), a.group[i]) - ids.begin()) * sets_per_group;
    bool all_valid = true, failed = false;
    for (int64_t t = 0; t < turns; ++t) {
      const int64_t cell = i * turns + t;
      const bool live = valid(cell) && !failed;
      trained[static_cast<size_t>(cell)] = live;
      all_valid = all_valid && valid(cell);
      if (a.filter_reward >= 0 && valid(cell) &&
          a.scores[cell * rewards + a.filter_reward] == 0.0f)
        failed = true;
      if (per_turn)
        units[static_cast<size_t>(cell)] = {sets_per_group == 1 ? set : set + t, 0.0f, 0.0f,
                                            a.filter_in_statistics ? valid(cell) : live};
    }
    if (!per_turn) {
      units[static_cast<size_t>(i)] = {set, 0.0f, 0.0f, all_valid};
      if (!all_valid) std::fill_n(trained.begin() + i * turns, turns, uint8_t{0});
    }
  }

  const auto column = [&](int64_t unit, int64_t k) {  // step 3
    return per_turn ? a.scores[unit * rewards + k]
                    : aggregate(a.scores + unit * turns * rewards + k, turns, rewards, a.aggregate);
  };
  const auto weighted = [&](float sum, int64_t k, float x) {  // steps 4 and 9, left to right
    const float term = a.weights[k] * x;
    return k == 0 ? term : sum + term;
  };

  std::vector<float> result(units.size(), 0.0f);
  if (a.fusion == 0) {
    for (size_t u = 0; u < units.size(); ++u)
      for (int64_t k = 0; units[u].counted && k < rewards; ++k)
        units[u].value = weighted(units[u].value, k, column(static_cast<int64_t>(u), k));
    normalise(units, sets, a);
    for (size_t u = 0; u < units.size(); ++u) result[u] = units[u].advantage;
  } else {
    for (int64_t k = 0; k < rewards; ++k) {
      for (size_t u = 0; u < units.size(); ++u)
        if (units[u].counted) units[u].value = column(static_cast<int64_t>(u), k);
      normalise(units, sets, a);
      for (size_t u = 0; u < units.size(); ++u)
        result[u] = weighted(result[u], k, units[u].advantage);
    }
  }

  for (int64_t cell = 0; cell < n * turns; ++cell) {  // steps 10 and 11
    float advantage = result[static_cast<size_t>(per_turn ? cell : cell / turns)];
    if (a.clip >= 0.0f) advantage = std::min(std::max(advantage, -a.clip), a.clip);
    const bool train = trained[static_cast<size_t>(cell)] != 0;
    a.advantage[cell] = train ? advantage + 0.0f : 0.0f;
    a.mask_out[cell] = train;
  }
}

}  // namespace editr2
