// token_log_prob: what token_chunk.cpp, compiled once per instruction set, offers to tokens.cpp.
#pragma once

#include "kernels.h"

namespace editr2 {

struct TokenArgs {
  Input logits;        // [M, V]
  const int64_t* ids;  // [M]
  double temperature;
  int64_t ignore_index;
  float* log_prob;     // [M]
  float* entropy;      // [M]
  float* lse;          // [M, 2]: the largest logit, ln sum exp((logit - largest) / T)
  int64_t m, v;
};

struct TokenGradArgs {
  Input logits;
  const int64_t* ids;
  double temperature;
  int64_t ignore_index;
  const float* lse;
  const float* entropy;
  const float* grad_log_prob;  // null reads as zero
  const float* grad_entropy;   // null reads as zero
  Output grad_logits;          // may be logits itself
  int64_t m, v;
};

struct TokenKernels {
  void (*row)(const TokenArgs&, int64_t i);
  void (*gradient_row)(const TokenGradArgs&, int64_t i);
};

void token_log_prob(const TokenArgs& args, int threads);
void token_log_prob_backward(const TokenGradArgs& args, int threads);

}  // namespace editr2
