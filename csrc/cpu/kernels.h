// What the instruction-set units (latent_tile.cpp, nft_tile.cpp, token_chunk.cpp, each compiled once per
// set) offer to the common code. Plain data only: a unit may share no inline function with code built
// for another instruction set.
#pragma once

#include <cstdint>

namespace editr2 {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A sum runs over tiles of at most this many elements of one sample and over 32 fixed lanes inside a
// tile. Both are constants of the result, so it does not depend on batch, threads or instruction set.
constexpr int64_t kTile = 4096;
constexpr int kSumLanes = 32;

// A sample of n elements is cut into spans, a span into tiles from its start. Without renormalisation
// the sample is the only span. With it a span is as many whole rows as fit into one tile or, where none
// does, one row: a tile never holds part of a row together with anything else.
struct Tiling {
  int64_t n, span, tiles_per_span, tiles;
};

struct Input {  // element i of sample b is data[b * stride + i]; data may be null
  const void* data;
  int dtype;
  int64_t stride;
};

struct Output {  // as Input; null where the result is not wanted
  void* data;
  int dtype;
  int64_t stride;
};

// Over a row that is longer than a tile: squares of the velocity and of the vector that is scaled, and
// that vector's product with its gradient (backward only).
struct RowSums {
  float v_squares, w_squares, dot;
};

// What mu is made of.
struct Latents {
  Input x, v, m_prev, v_uncond, v_uncond_image;
  const float* guidance;  // [B, 4] as in guidance.h; null for none
  int renorm;
  int64_t width;          // of a row; read with renormalisation only
  const float* table;
  const int64_t* step_index;
  Tiling tiling;
  const RowSums* row_sums;  // [B, rows of a sample] where rows are longer than a tile, else null
};

struct StepArgs {
  Latents latents;
  Input noise;  // null: from the seed
  const int64_t* seed;
  Output x_next, x0;
  bool score_stored;
};

struct ReplayArgs {
  Latents latents;
  Input x_next, v_ref, v_old;
  bool plain_ref;  // the moment of u - v_ref is taken without the row's B
};

struct Moments {  // sums over a tile of z^2, (B (u - v_ref))^2 and (B (u - v_old))^2
  double z, ref, old;
};

struct BackwardArgs {
  ReplayArgs replay;
  const float* factors;  // [B, 3]: on_z, on_ref, on_old
  Output grad_v, grad_v_uncond, grad_v_uncond_image;
};

struct NftArgs {
  Input x0, noise, v, v_old, v_ref;
  float beta;
  Tiling tiling;
  const float* factors;  // [B, 3]: on_positive, on_negative, on_ref; backward only
  Output grad_v;         // backward only
};

struct NftSums {  // over a tile, as NftMoments in objective.h
  double positive_abs, positive_square, negative_abs, negative_square, ref_square;
};

struct NormalArgs {
  const int64_t* seed;
  const int64_t* step;
  Output out;
  Tiling tiling;
};

struct TokenKernels;  // tokens.h

struct Kernels {
  const char* name;
  void (*normal)(const NormalArgs&, int64_t b, int64_t tile);
  double (*step)(const StepArgs&, int64_t b, int64_t tile);  // sum of z^2
  Moments (*replay)(const ReplayArgs&, int64_t b, int64_t tile);
  void (*backward)(const BackwardArgs&, int64_t b, int64_t tile);
  void (*row_squares)(const Latents&, int64_t b, int64_t tile, double* v_squares, double* w_squares);
  double (*row_dot)(const BackwardArgs&, int64_t b, int64_t tile);
  NftSums (*nft)(const NftArgs&, int64_t b, int64_t tile);
  void (*nft_backward)(const NftArgs&, int64_t b, int64_t tile);
  const TokenKernels* tokens;
};

}  // namespace editr2
