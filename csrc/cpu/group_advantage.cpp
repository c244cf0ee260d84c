// Counted units are packed set by set, so that every statistic runs over one dense range; the arithmetic, and the
// steps it is numbered by, are in credit.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace editr2 {
namespace {

constexpr int64_t kParallelUnits = 16384;  // about half a millisecond of work; waking a thread costs some 10 us

constexpr float kInfinity = __builtin_inff();

// Sum of value(x[j]) in fixed point; `size` that of the largest.
template <class Value>
int64_t sum_of(const float* x, int64_t n, int32_t size, const Value& value) {
  if (!credit_finite(size)) return 0;
  const float scale = credit_scale(size);
  int64_t sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += credit_fixed(value(x[j]), scale);
  return sum;
}

Centre centre_of(const float* x, int64_t n) {
  float least = kInfinity;
  for (int64_t j = 0; j < n; ++j) least = x[j] < least ? x[j] : least;
  int32_t size = 0;
  for (int64_t j = 0; j < n; ++j) size = std::max(size, credit_size(credit_above(x[j], least)));
  const auto above = [least](float value) { return credit_above(value, least); };
  return {least, credit_moment(sum_of(x, n, size, above), n, size)};
}

float std_of(const AdvantageArgs& a, const float* x, const Centre& centre, int64_t n, float* square) {
  int32_t size = 0;
  for (int64_t j = 0; j < n; ++j) {
    const float d = credit_deviation(centre, x[j]);
    square[j] = d * d;
    size = std::max(size, credit_size(square[j]));
  }
  const int64_t sum = sum_of(square, n, size, [](float value) { return value; });
  return ScalarLanes::sqrt(credit_moment(sum, a.divisor(n), size));
}

// Samples by group, groups in order of first appearance: members[start[g]] .. members[start[g + 1] - 1].
struct Groups {
  std::vector<int32_t> members, start;

  explicit Groups(const AdvantageArgs& a) : members(static_cast<size_t>(a.n)) {
    int bits = 1;
    while ((int64_t{1} << bits) < 2 * a.n) ++bits;
    std::vector<int32_t> table(size_t{1} << bits, -1), of(members.size());
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t id = a.group[i];
      size_t at = static_cast<size_t>((static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - bits));
      while (table[at] >= 0 && ids[static_cast<size_t>(table[at])] != id) at = (at + 1) & (table.size() - 1);
      if (table[at] < 0) {
        table[at] = static_cast<int32_t>(ids.size());
        ids.push_back(id);
      }
      of[static_cast<size_t>(i)] = table[at];
    }
    start.assign(ids.size() + 2, 0);
    for (const int32_t g : of) ++start[static_cast<size_t>(g) + 2];
    for (size_t g = 2; g < start.size(); ++g) start[g] += start[g - 1];
    for (size_t i = 0; i < of.size(); ++i)
      members[static_cast<size_t>(start[static_cast<size_t>(of[i]) + 1]++)] = static_cast<int32_t>(i);
    start.pop_back();
  }
};

struct Sets {
  std::vector<int32_t> unit;   // counted units, set after set
  std::vector<int64_t> begin;  // set s is unit[begin[s]] .. unit[begin[s + 1] - 1]

  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t size(int64_t s) const { return begin[static_cast<size_t>(s) + 1] - begin[static_cast<size_t>(s)]; }
};

// Steps 1, 2 and 5. Leaves in mask_out: 1 "trains" + 2 "its unit counts". The arguments come by value, so that no byte
// stored there can be one of them.
Sets counted_sets(const AdvantageArgs a) {
  const Groups groups(a);
  const bool by_turn = a.baseline == Baseline::kSessionTurn;
  const int64_t per_sample = a.per_turn() ? a.turns : 1;
  const int64_t ranges = by_turn ? per_sample : 1;
  const int64_t length = by_turn ? 1 : per_sample;
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t last_live = credit_last_live(a, i);
    for (int64_t t = 0; t < a.turns; ++t)
      a.mask_out[i * a.turns + t] = static_cast<uint8_t>(credit_trained(a, i, t, last_live) |
                                                         credit_counted(a, i, t, last_live) << 1);
  }
  Sets sets;
  sets.unit.resize(static_cast<size_t>(a.units()) + 1);  // one to spare: an entry is written, then kept or not
  sets.begin.push_back(0);
  int32_t* next = sets.unit.data();
  for (size_t g = 0; g + 1 < groups.start.size(); ++g)
    for (int64_t first = 0; first < ranges; ++first) {
      for (int32_t m = groups.start[g]; m < groups.start[g + 1]; ++m) {
        const int64_t i = groups.members[static_cast<size_t>(m)];
        for (int64_t t = first; t < first + length; ++t) {
          *next = static_cast<int32_t>(i * per_sample + t);
          next += a.mask_out[i * a.turns + t] >> 1;
        }
      }
      sets.begin.push_back(next - sets.unit.data());
    }
  sets.unit.resize(static_cast<size_t>(next - sets.unit.data()));
  return sets;
}

// The end of step 5: takes dropped sets out of `sets` and mask_out. value and square: scratch for all units.
void drop_sets(const AdvantageArgs& a, Sets& sets, float* value, float* square) {
  const int64_t cells = a.per_turn() ? 1 : a.turns;
  auto kept = sets.unit.begin();
  for (int64_t s = 0; s < sets.count(); ++s) {
    const auto first = sets.unit.begin() + sets.begin[static_cast<size_t>(s)];
    const auto last = sets.unit.begin() + sets.begin[static_cast<size_t>(s) + 1];
    const int64_t n = last - first;
    for (int64_t j = 0; j < n; ++j) value[j] = credit_fused(a, first[j]);
    const Centre centre = centre_of(value, n);
    const bool drop = credit_drops(a, centre, std_of(a, value, centre, n, square));
    sets.begin[static_cast<size_t>(s)] = kept - sets.unit.begin();
    if (!drop)
      kept = std::copy(first, last, kept);
    else
      for (auto unit = first; unit != last; ++unit) std::fill_n(a.mask_out + *unit * cells, cells, uint8_t{0});
  }
  sets.begin.back() = kept - sets.unit.begin();
  sets.unit.erase(kept, sets.unit.end());
}

// The units of `sets` that count in column k, and where each stands in `sets`.
Sets in_column(const AdvantageArgs& a, const Sets& sets, int64_t k, std::vector<int32_t>& place) {
  Sets column;
  place.clear();
  column.begin.push_back(0);
  for (int64_t s = 0; s < sets.count(); ++s) {
    for (int64_t j = sets.begin[static_cast<size_t>(s)]; j < sets.begin[static_cast<size_t>(s) + 1]; ++j) {
      const int32_t unit = sets.unit[static_cast<size_t>(j)];
      if (!credit_in_column(a, unit, k)) continue;
      column.unit.push_back(unit);
      place.push_back(static_cast<int32_t>(j));
    }
    column.begin.push_back(static_cast<int64_t>(place.size()));
  }
  return column;
}

// Writes the fused advantage of every packed unit into `fused`, all 0. value and square: scratch as long.
void normalise(const AdvantageArgs& a, const Sets& all, int threads, float* value, float* square, float* fused) {
  const bool apart = a.applies != nullptr && a.fusion != Fusion::kReward;
  Sets column;
  std::vector<int32_t> place;
  for (int64_t k = 0; k < a.columns(); ++k) {
    if (apart) column = in_column(a, all, k, place);
    const Sets& sets = apart ? column : all;
    const int64_t total = static_cast<int64_t>(sets.unit.size());
    const int32_t* unit = sets.unit.data();
    if (a.per_turn() && a.fusion != Fusion::kReward)
      for (int64_t j = 0; j < total; ++j) value[j] = a.scores[unit[j] * a.rewards + k];
    else
      for (int64_t j = 0; j < total; ++j) value[j] = credit_column(a, unit[j], k);
    float global = 0.0f;
    if (a.std == StdOver::kGlobal)
      global = credit_denominator(a, std_of(a, value, centre_of(value, total), total, square));
    const auto one_set = [&](int64_t s) {
      const int64_t begin = sets.begin[static_cast<size_t>(s)], n = sets.size(s);
      float* x = value + begin;
      const Centre centre = centre_of(x, n);
      float denominator = global;
      if (a.std == StdOver::kGroup) denominator = credit_denominator(a, std_of(a, x, centre, n, square + begin));
      for (int64_t j = 0; j < n; ++j) {
        const float d = credit_deviation(centre, x[j]);
        const float result = a.std == StdOver::kNone ? d : credit_normalise(d, denominator);
        float& sum = fused[apart ? place[static_cast<size_t>(begin + j)] : begin + j];
        sum = a.fusion == Fusion::kReward ? result : credit_fuse(a, k, sum, result);
      }
    };
    parallel_for(sets.count(), total >= kParallelUnits ? threads : 1, one_set);
  }
  if (apart)
    for (size_t j = 0; j < all.unit.size(); ++j) fused[j] = fused[j] * credit_share(a, all.unit[j]);
}

void check(const AdvantageArgs& a) {
  credit_check(a, need);
  for (int64_t k = 0; a.weights != nullptr && k < a.rewards; ++k)
    if (!credit_finite(credit_size(a.weights[k]))) reject("weights", std::to_string(a.weights[k]), "a finite number");
  int bad = 0;  // first without branches: almost always nothing is
  for (int64_t j = 0; j < a.n * a.turns * a.rewards; ++j) bad |= !credit_finite(credit_size(a.scores[j]));
  for (int64_t cell = 0; bad && cell < a.n * a.turns; ++cell)
    for (int64_t k = 0; k < a.rewards; ++k) {
      const float score = a.scores[cell * a.rewards + k];
      if (!credit_finite(credit_size(score)) && credit_valid(a, cell) && credit_applies(a, cell, k))
        reject("scores", std::to_string(score),
               a.applies == nullptr ? "finite wherever mask is true" : "finite wherever mask and applies are true");
    }
}

}  // namespace

void group_advantage(const AdvantageArgs& a, int threads) {
  check(a);
  if (a.n * a.turns == 0) return;
  Sets sets = counted_sets(a);
  std::vector<float> value(sets.unit.size()), square(value.size()), fused(value.size());
  if (a.drops()) drop_sets(a, sets, value.data(), square.data());
  normalise(a, sets, threads, value.data(), square.data(), fused.data());

  const int64_t total = static_cast<int64_t>(sets.unit.size());
  if (a.fusion == Fusion::kGdpo) {  // step 10
    const Centre centre = centre_of(fused.data(), total);
    const float denominator = credit_denominator(a, std_of(a, fused.data(), centre, total, square.data()));
    for (float& x : fused) x = credit_normalise(credit_deviation(centre, x), denominator);
  }

  const int64_t all_cells = a.n * a.turns, cells = a.per_turn() ? 1 : a.turns;
  uint8_t* trained = a.mask_out;
  float* advantage = a.advantage;
  for (int64_t cell = 0; cell < all_cells; ++cell) trained[cell] &= 1;
  std::fill_n(advantage, all_cells, 0.0f);  // steps 11 and 12
  for (float& x : fused) x = credit_finish(a, x);
  for (int64_t j = 0; j < total; ++j) {
    const int64_t first = sets.unit[static_cast<size_t>(j)] * cells;
    for (int64_t cell = first; cell < first + cells; ++cell)
      advantage[cell] = trained[cell] != 0 ? fused[static_cast<size_t>(j)] : 0.0f;
  }
}

}  // namespace editr2
