#include "ops.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../transition.h"
#include "dispatch.h"
#include "pool.h"

namespace editr2 {
namespace {

// Waking a sleeping thread costs tens of microseconds, the time one core needs for some ten chunks.
constexpr int64_t kChunksPerThread = 4;

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

void check_sizes(int64_t batch, int64_t n, int threads) {
  need(batch >= 0, "B", batch, "a size >= 0");
  need(n >= 0, "N", n, "a size >= 0");
  need(threads >= 1, "threads", threads, "at least 1");
  need(n == 0 || batch <= INT64_MAX / n, "B", batch, "a batch whose B * N fits 63 bits");
}

void check_pointer(const void* p, bool needed, const char* argument) {
  if (needed && p == nullptr) reject(argument, "0", "the address of a tensor");
}

void check_dtype(int dtype, const char* argument) {
  need(dtype >= kFloat32 && dtype <= kFloat16, argument, dtype,
       "0 (float32), 1 (bfloat16) or 2 (float16)");
}

void check_input(const Input& in, bool needed, int64_t batch, int64_t n, const std::string& name) {
  check_pointer(in.data, needed && batch * n > 0, (name + "_ptr").c_str());
  check_dtype(in.dtype, (name + "_dtype").c_str());
  need(in.stride >= 0, (name + "_stride").c_str(), in.stride, "a stride >= 0");
}

void check_table(const float* table, const int64_t* step_index, int64_t rows, int64_t batch) {
  need(rows >= 0, "rows", rows, "a size >= 0");
  if (batch == 0) return;
  check_pointer(table, true, "table_ptr");
  check_pointer(step_index, true, "step_index_ptr");
  for (int64_t b = 0; b < batch; ++b)
    if (step_index[b] < 0 || step_index[b] >= rows)
      reject("step_index", std::to_string(step_index[b]) + " for sample " + std::to_string(b),
             ("0 <= step_index < " + std::to_string(rows) + ", the rows of the table").c_str());
}

void check_replay(const LogProbArgs& a, int64_t rows, int64_t batch, int threads) {
  check_sizes(batch, a.n, threads);
  check_input(a.x, true, batch, a.n, "x");
  check_input(a.x_next, true, batch, a.n, "x_next");
  check_input(a.v, true, batch, a.n, "v");
  check_input(a.v_ref, false, batch, a.n, "v_ref");
  check_table(a.table, a.step_index, rows, batch);
}

template <class Task>  // task(b, chunk, flat index)
void for_chunks(int64_t batch, int64_t n, int threads, const Task& task) {
  const int64_t chunks = chunks_of(n);
  const int64_t count = batch * chunks;
  const int64_t useful = std::max<int64_t>(1, count / kChunksPerThread);
  parallel_for(count, static_cast<int>(std::min<int64_t>(threads, useful)),
               [&](int64_t i) { task(i / chunks, i % chunks, i); });
}

// Mean over a sample from its chunks' partial sums, added in order; NaN for an empty sample.
float mean_of(const std::vector<double>& partial, int64_t b, int64_t n) {
  const int64_t chunks = chunks_of(n);
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[static_cast<size_t>(b * chunks + c)];
  return static_cast<float>(sum / static_cast<double>(n));
}

float log_prob_of(const float* table, int64_t row, float mean_square) {
  const Row& r = reinterpret_cast<const Row*>(table)[row];
  const float scaled = r.w * mean_square;
  return scaled + r.c;
}

}  // namespace

void reject(const char* argument, const std::string& given, const char* accepted) {
  throw std::invalid_argument(std::string(argument) + ": got " + given + ", accepted: " + accepted);
}

void need(bool condition, const char* argument, int64_t given, const char* accepted) {
  if (!condition) reject(argument, std::to_string(given), accepted);
}

void philox_normal(const NormalArgs& a, int64_t batch, int threads) {
  check_sizes(batch, a.n, threads);
  check_dtype(a.out.dtype, "out_dtype");
  check_pointer(a.seed, batch > 0, "seed_ptr");
  check_pointer(a.step, batch > 0, "step_ptr");
  check_pointer(a.out.data, batch * a.n > 0, "out_ptr");
  const Kernels& k = active_kernels();
  for_chunks(batch, a.n, threads, [&](int64_t b, int64_t c, int64_t) { k.normal_chunk(a, b, c); });
}

void sde_step(const StepArgs& a, int64_t rows, float* log_prob, int64_t batch, int threads) {
  check_sizes(batch, a.n, threads);
  check_input(a.x, true, batch, a.n, "x");
  check_input(a.v, true, batch, a.n, "v");
  check_input(a.noise, false, batch, a.n, "noise");
  check_dtype(a.out.dtype, "out_dtype");
  check_pointer(a.out.data, batch * a.n > 0, "out_ptr");
  check_table(a.table, a.step_index, rows, batch);
  check_pointer(a.seed, batch > 0 && a.noise.data == nullptr, "seed_ptr");
  const Kernels& k = active_kernels();
  std::vector<double> partial(static_cast<size_t>(batch * chunks_of(a.n)));
  for_chunks(batch, a.n, threads, [&](int64_t b, int64_t c, int64_t i) {
    partial[static_cast<size_t>(i)] = k.step_chunk(a, b, c);
  });
  if (log_prob == nullptr) return;
  for (int64_t b = 0; b < batch; ++b)
    log_prob[b] = log_prob_of(a.table, a.step_index[b], mean_of(partial, b, a.n));
}

void sde_log_prob(const LogProbArgs& a, int64_t rows, float* log_prob, float* mean_diff,
                  int64_t batch, int threads) {
  check_replay(a, rows, batch, threads);
  check_pointer(a.v_ref.data, mean_diff != nullptr && batch * a.n > 0, "v_ref_ptr");
  const Kernels& k = active_kernels();
  const size_t count = static_cast<size_t>(batch * chunks_of(a.n));
  std::vector<double> z2(count), diff2(count);
  for_chunks(batch, a.n, threads, [&](int64_t b, int64_t c, int64_t i) {
    k.log_prob_chunk(a, b, c, &z2[static_cast<size_t>(i)], &diff2[static_cast<size_t>(i)]);
  });
  for (int64_t b = 0; b < batch; ++b) {
    if (log_prob != nullptr)
      log_prob[b] = log_prob_of(a.table, a.step_index[b], mean_of(z2, b, a.n));
    if (mean_diff != nullptr) mean_diff[b] = mean_of(diff2, b, a.n);
  }
}

void sde_log_prob_backward(const LogProbArgs& a, int64_t rows, int64_t batch, int threads) {
  check_replay(a, rows, batch, threads);
  check_pointer(a.v_ref.data, a.grad_mean_diff != nullptr && batch * a.n > 0, "v_ref_ptr");
  check_dtype(a.grad_v.dtype, "grad_v_dtype");
  check_pointer(a.grad_v.data, batch * a.n > 0, "grad_v_ptr");
  const Kernels& k = active_kernels();
  for_chunks(batch, a.n, threads,
             [&](int64_t b, int64_t c, int64_t) { k.backward_chunk(a, b, c); });
}

}  // namespace editr2
