// The CUDA operators as plain C++: what bindings_cuda.cpp calls, free of CUDA headers. Every function
// checks its arguments first (std::invalid_argument naming the argument; device memory is never read on
// the host), then queues kernels on the given stream: no allocation, no synchronisation, so that a graph
// can capture it. A failed launch throws std::runtime_error.
//
// `workspace` is scratch memory of at least workspace_bytes(...) on the device, 16-byte aligned. A sample
// whose step is no row of the table is NaN in every output.
#pragma once

#include <cstdint>
#include <string>

#include "../credit.h"
#include "../guidance.h"
#include "../objective.h"

namespace editr2::gpu {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Rows {  // element i of sample b is data[b * stride + i]; data may be null
  void* data;
  int dtype;
  int64_t stride;
};

struct Target {
  int device;
  void* stream;
};

// What every operator on latents reads: [B, n] tensors and, by sample, a row of table[rows, 8].
struct Latents {
  Rows x, v, m_prev, v_uncond, v_uncond_image;
  const float* guidance;  // [B, 4] as in guidance.h, or null
  int renorm;
  int64_t width;  // elements of a row where renorm normalises rows
  const float* table;
  int64_t rows;
  const int64_t* step_index;
  int64_t n;
};

// As CUDA numbers them, 1000 major + 10 minor: what the driver supports, 0 where there is none, and the runtime linked
// in. Both make no context.
int driver_version();
int runtime_version();

int64_t workspace_bytes(int64_t batch, int64_t n, int64_t width, int renorm);

void philox_normal(const int64_t* seed, const int64_t* step, Rows out, int64_t batch, int64_t n, Target target);

void sde_step(const Latents& latents, Rows noise, const int64_t* seed, Rows x_next, Rows x0, float* log_prob,
              bool score_stored, void* workspace, int64_t batch, Target target);

void sde_log_prob(const Latents& latents, Rows x_next, Rows v_ref, float* log_prob, float* mean_diff,
                  void* workspace, int64_t batch, Target target);

struct GrpoBatch {  // buffers of grpo_loss, by sample
  const float *old_log_prob, *advantage;
  const uint8_t* mask;  // null: every sample counts
  float normalizer;     // <= 0: the number of samples that count, at least 1
  float *loss, *log_prob, *ratio, *kl, *metrics, *factors;
};
void grpo_loss(const Latents& latents, Rows x_next, Rows v_ref, Rows v_old, const GrpoOptions& options,
               const GrpoBatch& samples, void* workspace, int64_t batch, Target target);

struct Incoming {  // gradients by sample: factors[B, 3] times scale[1], or those of log_prob and mean_diff
  const float *factors, *scale, *grad_log_prob, *grad_mean_diff;
};
void replay_backward(const Latents& latents, Rows x_next, Rows v_ref, Rows v_old, const Incoming& incoming,
                     Rows grad_v, Rows grad_v_uncond, Rows grad_v_uncond_image, void* workspace, int64_t batch,
                     Target target);

struct NftLatents {
  Rows x0, noise, v, v_old, v_ref;
  float beta;
  int64_t n;
};
struct NftBatch {  // buffers of nft_loss, by sample
  const float *sigma, *r;
  const uint8_t* mask;
  float normalizer;
  float *loss, *metrics, *factors;
};
void nft_loss(const NftLatents& latents, const NftOptions& options, const NftBatch& samples, void* workspace,
              int64_t batch, Target target);
void nft_loss_backward(const NftLatents& latents, const float* factors, const float* scale, Rows grad_v,
                       int64_t batch, Target target);

struct TokenRows {  // [m, v] logits and the ids [m]; one that is outside [0, v) and not ignore_index gives NaN
  Rows logits;
  const int64_t* ids;
  double temperature;
  int64_t ignore_index, m, v;
};
// lse[m, 2]: the largest logit, ln sum exp((logit - largest) / temperature).
void token_log_prob(const TokenRows& rows, float* log_prob, float* entropy, float* lse, Target target);
// Null gradients read as zero; grad_logits may be the logits.
void token_log_prob_backward(const TokenRows& rows, const float* lse, const float* entropy,
                             const float* grad_log_prob, const float* grad_entropy, Rows grad_logits,
                             Target target);

// `workspace`, for std "global" and fusion "gdpo": 16 bytes of which the first 4 are 0, then for "global" a float a
// column and unit. Scores that are not finite give NaN.
void group_advantage(const AdvantageArgs& args, void* workspace, Target target);

}  // namespace editr2::gpu
