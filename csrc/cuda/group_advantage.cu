// group_advantage in one launch: a block a sample, of which the first of each group does its group. What needs the
// whole batch (std "global", fusion "gdpo") is done by the block that finishes last, which it learns from a counter.
// Statistics are integer sums, so nothing depends on which block that is, nor on the order of the others.
//
// Between the two stages the outputs carry intermediates, at the cell of a unit's first turn: `advantage` the fused
// advantage so far, `mask_out` bit 0 "trains" and bit 1 "counts"; `scratch` the differences d[column, unit] for std
// "global". A thread has the same units in every pass over a set, and in every pass over the batch.
#include "common.cuh"

namespace editr2::gpu {
namespace {

struct GroupArgs {
  AdvantageArgs a;
  int32_t* counter;  // null unless something needs the whole batch
  float* scratch;
};

// What a statistic is over: the counted units of a set; of the batch; of the batch, by their fused advantages.
enum Where : int { kSet, kBatch, kFused };

struct Range {
  int where;
  int64_t group, turn;  // of a set
  int64_t length;       // units to look at
};

struct Unit {
  int64_t index, sample, turn, first;  // `first`: the cell of its first turn
  bool counted;
};

__device__ inline Unit unit_of(const AdvantageArgs& a, const Range& range, int64_t j) {
  Unit u = {j, j, 0, 0, false};
  if (a.per_turn() && range.length == a.n) {  // one turn of every sample; where n is all units, both ways agree
    u.turn = range.turn;
    u.index = j * a.turns + u.turn;
  } else if (a.per_turn()) {
    // At most 2^20 units; a division of 64 bits would be a subroutine call.
    u.sample = static_cast<uint32_t>(j) / static_cast<uint32_t>(a.turns);
    u.turn = j - u.sample * a.turns;
  }
  u.first = u.sample * a.turns + u.turn;
  u.counted = range.where == kSet ? a.group[u.sample] == range.group &&
                                        credit_counted(a, u.sample, u.turn, credit_last_live(a, u.sample))
                                  : (a.mask_out[u.first] & 2) != 0;
  return u;
}

template <class T, class Join>
__device__ T over_block(T value, int64_t* shared, Join join) {
  T* slots = reinterpret_cast<T*>(shared);
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(kAllLanes, value, distance));
  if (lane_of() == 0) slots[warp_of()] = value;
  __syncthreads();
  value = slots[0];
  for (int warp = 1; warp < kWarps; ++warp) value = join(value, slots[warp]);
  __syncthreads();
  return value;
}
template <class T>
__device__ T block_add(T value, int64_t* shared) {
  return over_block(value, shared, [](T x, T y) { return x + y; });
}
template <class T>
__device__ T block_largest(T value, int64_t* shared) {
  return over_block(value, shared, [](T x, T y) { return y > x ? y : x; });
}

// Calls f(unit, value) for the thread's units that count in the column.
template <class Function>
__device__ void each_counted(const AdvantageArgs& a, const Range& range, int64_t column, const Function& f) {
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < range.length; j += kThreads) {
    const Unit u = unit_of(a, range, j);
    if (!u.counted) continue;
    if (range.where == kFused)
      f(u, a.advantage[u.first]);
    else if (credit_in_column(a, u.index, column))
      f(u, credit_column(a, u.index, column));
  }
}

struct Statistics {
  Centre centre;
  float std;
};

__device__ Statistics statistics(const AdvantageArgs& a, const Range& range, int64_t column, bool with_std,
                                 int64_t* shared) {
  float high = -ScalarLanes::bits_float(0x7F800000), low = -high;
  int32_t size = 0;
  int64_t count = 0, sum = 0;
  each_counted(a, range, column, [&](const Unit&, float x) {
    high = x > high ? x : high;
    low = x < low ? x : low;
    size = credit_size(x) > size ? credit_size(x) : size;
    ++count;
  });
  high = block_largest(high, shared);
  low = -block_largest(-low, shared);
  size = block_largest(size, shared);
  count = block_add(count, shared);
  if (credit_finite(size)) size = credit_size(credit_above(high, low));  // rounding keeps order: the largest above low
  if (credit_finite(size))
    each_counted(a, range, column,
                 [&](const Unit&, float x) { sum += credit_fixed(credit_above(x, low), credit_scale(size)); });
  sum = block_add(sum, shared);
  Statistics result = {{low, credit_moment(sum, count, size)}, 0.0f};
  if (!with_std) return result;

  size = 0;
  sum = 0;
  each_counted(a, range, column, [&](const Unit&, float x) {
    const float d = credit_deviation(result.centre, x);
    size = credit_size(d * d) > size ? credit_size(d * d) : size;
  });
  size = block_largest(size, shared);
  if (credit_finite(size))
    each_counted(a, range, column, [&](const Unit&, float x) {
      const float d = credit_deviation(result.centre, x);
      sum += credit_fixed(d * d, credit_scale(size));
    });
  sum = block_add(sum, shared);
  result.std = ScalarLanes::sqrt(credit_moment(sum, a.divisor(count), size));
  return result;
}

// Step 9: one term of the sum over rewards, kept in memory.
__device__ void accumulate(const AdvantageArgs& a, int64_t k, const Unit& u, float x) {
  a.advantage[u.first] = a.fusion == Fusion::kReward ? x : credit_fuse(a, k, k == 0 ? 0.0f : a.advantage[u.first], x);
}
// Where not every reward applies: what that sum begins with, and what it is multiplied by at the end. A thread has the
// same units in both and in between.
__device__ void each_sum(const AdvantageArgs& a, const Range& range, bool begin) {
  if (a.applies == nullptr || a.fusion == Fusion::kReward) return;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < range.length; j += kThreads) {
    const Unit u = unit_of(a, range, j);
    if (u.counted) a.advantage[u.first] = begin ? 0.0f : a.advantage[u.first] * credit_share(a, u.index);
  }
}

__device__ void one_set(const GroupArgs& g, const Range& set, int64_t* shared) {
  const AdvantageArgs& a = g.a;
  bool keep = true;
  if (a.drops()) {
    AdvantageArgs fused = a;
    fused.fusion = Fusion::kReward;  // by the fused value whatever the fusion
    const Statistics s = statistics(fused, set, 0, true, shared);
    keep = !credit_drops(a, s.centre, s.std);
  }
  const bool sums = keep && a.std != StdOver::kGlobal;
  if (sums) each_sum(a, set, true);
#pragma unroll 1
  for (int64_t k = 0; keep && k < a.columns(); ++k) {
    const Statistics s = statistics(a, set, k, a.std == StdOver::kGroup, shared);
    const float denominator = credit_denominator(a, s.std);
    each_counted(a, set, k, [&](const Unit& u, float x) {
      const float d = credit_deviation(s.centre, x);
      if (a.std == StdOver::kGlobal)
        g.scratch[k * a.units() + u.index] = d;
      else
        accumulate(a, k, u, a.std == StdOver::kNone ? d : credit_normalise(d, denominator));
    });
  }
  if (sums) each_sum(a, set, false);
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < set.length; j += kThreads) {  // steps 11 and 12
    const Unit u = unit_of(a, set, j);
    if (a.group[u.sample] != set.group) continue;
    const bool counted = u.counted && keep;
    const float x = counted ? credit_finish(a, a.advantage[u.first]) : 0.0f;
    const int64_t live = credit_last_live(a, u.sample);
#pragma unroll 1
    for (int64_t t = u.turn; t < (a.per_turn() ? u.turn + 1 : a.turns); ++t) {
      const int64_t cell = u.sample * a.turns + t;
      const bool trained = counted && credit_trained(a, u.sample, t, live);
      if (g.counter == nullptr) a.advantage[cell] = trained ? x : 0.0f;
      a.mask_out[cell] = static_cast<uint8_t>(trained + (g.counter != nullptr && counted ? 2 : 0));
    }
  }
}

__device__ void whole_batch(const GroupArgs& g, int64_t* shared) {
  const AdvantageArgs& a = g.a;
  const Range batch = {kBatch, 0, 0, a.units()};
  if (a.std == StdOver::kGlobal) each_sum(a, batch, true);
#pragma unroll 1
  for (int64_t k = 0; a.std == StdOver::kGlobal && k < a.columns(); ++k) {
    const float denominator = credit_denominator(a, statistics(a, batch, k, true, shared).std);
    each_counted(a, batch, k, [&](const Unit& u, float) {
      accumulate(a, k, u, credit_normalise(g.scratch[k * a.units() + u.index], denominator));
    });
  }
  if (a.std == StdOver::kGlobal) each_sum(a, batch, false);
  Statistics s = {{0.0f, 0.0f}, 0.0f};
  if (a.fusion == Fusion::kGdpo) s = statistics(a, {kFused, 0, 0, a.units()}, 0, true, shared);
  const float denominator = credit_denominator(a, s.std);
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < batch.length; j += kThreads) {  // steps 10 to 12
    const Unit u = unit_of(a, batch, j);
    float x = u.counted ? a.advantage[u.first] : 0.0f;
    if (a.fusion == Fusion::kGdpo) x = credit_normalise(credit_deviation(s.centre, x), denominator);
    x = credit_finish(a, x);
#pragma unroll 1
    for (int64_t t = u.turn; t < (a.per_turn() ? u.turn + 1 : a.turns); ++t) {
      const int64_t cell = u.sample * a.turns + t;
      const bool trained = (a.mask_out[cell] & 1) != 0;
      a.advantage[cell] = trained ? x : 0.0f;
      a.mask_out[cell] = trained;
    }
  }
}

// Four blocks a multiprocessor: left alone, ptxas squeezes it into 48 registers for sm_80 and sm_90 and spills.
__global__ void __launch_bounds__(kThreads, 4) group_kernel(const __grid_constant__ GroupArgs g) {
  __shared__ int64_t shared[kWarps];
  __shared__ int last;
  const AdvantageArgs& a = g.a;
  const int64_t me = blockIdx.x, group = a.group[me];
  int earlier = 0;
#pragma unroll 1
  for (int64_t start = 0; start < me && earlier == 0; start += kThreads) {
    const int64_t j = start + threadIdx.x;
    earlier = block_largest(j < me && a.group[j] == group ? 1 : 0, shared);
  }
  if (earlier == 0) {
    const bool by_turn = a.baseline == Baseline::kSessionTurn;
#pragma unroll 1
    for (int64_t t = 0; t < (by_turn ? a.turns : 1); ++t)
      one_set(g, {kSet, group, t, by_turn ? a.n : a.units()}, shared);
  }
  if (g.counter == nullptr) return;
  __threadfence();  // all of this block's stores come before its arrival
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(g.counter, 1) == a.n - 1;
  __syncthreads();
  if (last == 0) return;
  __threadfence();
  whole_batch(g, shared);
}

}  // namespace

void group_advantage(const AdvantageArgs& a, void* workspace, Target target) {
  credit_check(a, [](bool condition, const char* name, int64_t given, const char* accepted) {
    need(condition, name, given, accepted);
  });
  if (a.n * a.turns == 0) return;
  const bool collective = a.std == StdOver::kGlobal || a.fusion == Fusion::kGdpo;
  if (collective) need_pointer(workspace, "workspace");
  const GroupArgs arguments = {a, collective ? static_cast<int32_t*>(workspace) : nullptr,
                               collective ? static_cast<float*>(workspace) + 4 : nullptr};
  const DeviceGuard guard(target.device);
  EDITR2_LAUNCH(group_kernel, grid_of(a.n), kThreads, 0, target.stream, arguments);
}

}  // namespace editr2::gpu
