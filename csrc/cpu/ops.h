// The operators on whole batches: arguments are checked before anything is written
// (std::invalid_argument naming the argument), then the chunks of all samples are spread over threads.
#pragma once

#include <string>

#include "kernels.h"

namespace editr2 {

void philox_normal(const NormalArgs& args, int64_t batch, int threads);

// log_prob may be null.
void sde_step(const StepArgs& args, int64_t rows, float* log_prob, int64_t batch, int threads);

// log_prob and mean_diff may be null; mean_diff needs v_ref.
void sde_log_prob(const LogProbArgs& args, int64_t rows, float* log_prob, float* mean_diff,
                  int64_t batch, int threads);

void sde_log_prob_backward(const LogProbArgs& args, int64_t rows, int64_t batch, int threads);

struct AdvantageArgs {
  const float* scores;    // [n, turns, rewards]
  const int64_t* group;   // [n]
  const float* weights;   // [rewards]
  const uint8_t* mask;    // [n, turns], null = all valid
  int aggregate;          // 0 none, 1 mean, 2 last, 3 product, 4 prefix
  int fusion;             // 0 reward, 1 advantage
  int baseline;           // 0 session, 1 session_turn
  int std;                // 0 group, 1 global, 2 none
  bool unbiased;
  float eps;
  float clip;             // negative = none
  bool broadcast;
  int filter_reward;      // -1 = none
  bool filter_in_statistics;
  float* advantage;       // [n, turns]
  uint8_t* mask_out;      // [n, turns]
  int64_t n, turns, rewards;
};

// The definition, to the order of every rounding, is in editr2_kernels/group_advantage.py.
void group_advantage(const AdvantageArgs& args);

// Checks shared with the bindings.
[[noreturn]] void reject(const char* argument, const std::string& given, const char* accepted);
void need(bool condition, const char* argument, int64_t given, const char* accepted);

}  // namespace editr2
