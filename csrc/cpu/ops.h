// The operators on whole batches: arguments are checked before anything is written
// (std::invalid_argument naming the argument), then the tiles of all samples are spread over threads.
#pragma once

#include <string>

#include "../credit.h"
#include "kernels.h"

namespace editr2 {

// The sizes every operator has; `rows` of the transition table where there is one.
struct Sizes {
  int64_t batch, n, rows;
  int threads;
};

void philox_normal(NormalArgs args, const Sizes& sizes);

// log_prob may be null. `tiling`, `row_sums` and the factors of an argument are filled in here.
void sde_step(StepArgs args, float* log_prob, const Sizes& sizes);

// log_prob and mean_diff may be null; without v_ref mean_diff is 0.
void sde_log_prob(ReplayArgs args, float* log_prob, float* mean_diff, const Sizes& sizes);

struct GrpoArgs {
  ReplayArgs replay;
  const float* old_log_prob;
  const float* advantage;
  const uint8_t* mask;  // null: every sample counts
  float clip_low, clip_high, advantage_clip, kl_weight;
  int kl_scale;
  bool guard;
  float normalizer;  // <= 0: the number of samples that count, at least 1
  float* loss;       // [1]
  float *log_prob, *ratio, *kl;  // [B]
  float* metrics;    // [8], GrpoMetric
  float* factors;    // [B, 3], for a gradient of 1 to the loss
};
void grpo_loss(GrpoArgs args, const Sizes& sizes);

// Factors given, times `scale` where that is not null; or null, then made from the gradients of
// sde_log_prob's results, where null reads as zero.
struct FactorArgs {
  const float* factors;
  const float* scale;
  const float* grad_log_prob;
  const float* grad_mean_diff;
};
void replay_backward(BackwardArgs args, const FactorArgs& from, const Sizes& sizes);

struct NftLossArgs {
  NftArgs nft;
  const float* sigma;
  const float* r;
  const uint8_t* mask;
  float advantage_max, ref_weight, min_weight, normalizer;
  float* loss;
  float* metrics;  // [5], NftMetric
  float* factors;  // [B, 3]
};
void nft_loss(NftLossArgs args, const Sizes& sizes);
void nft_loss_backward(NftArgs args, const float* factors, const float* scale, const Sizes& sizes);

// The definition, to the order of every rounding, is in editr2_kernels/group_advantage.py.
void group_advantage(const AdvantageArgs& args, int threads);

// Checks shared with the bindings.
[[noreturn]] void reject(const char* argument, const std::string& given, const char* accepted);
void need(bool condition, const char* argument, int64_t given, const char* accepted);

}  // namespace editr2
