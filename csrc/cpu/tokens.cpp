#include "tokens.h"

#include <string>

#include "dispatch.h"
#include "ops.h"
#include "pool.h"

namespace editr2 {
namespace {

// Logits that repay waking a thread: tens of microseconds against a nanosecond or less a logit.
constexpr int64_t kLogitsPerThread = 1 << 16;

void check_pointer(const void* p, const char* argument) {
  if (p == nullptr) reject(argument, "0", "the address of a tensor");
}

template <class Rows>  // Input or Output
void check_rows(const Rows& r, const char* argument, int64_t m) {
  if (m > 0) check_pointer(r.data, argument);
  need(r.dtype >= kFloat32 && r.dtype <= kFloat16, argument, r.dtype,
       "dtype 0 (float32), 1 (bfloat16) or 2 (float16)");
  need(r.stride >= 0, argument, r.stride, "a stride >= 0");
}

template <class Args>
void check(const Args& a, int threads) {
  need(a.m >= 0, "M", a.m, "a size >= 0");
  need(a.v >= 1, "V", a.v, "a vocabulary of at least 1");
  need(a.m <= INT64_MAX / a.v, "M", a.m, "a size whose M * V fits 63 bits");
  need(threads >= 1, "threads", threads, "at least 1");
  if (!(a.temperature > 0.0)) reject("temperature", std::to_string(a.temperature), "a number > 0");
  check_rows(a.logits, "logits", a.m);
  if (a.m == 0) return;
  check_pointer(a.ids, "ids");
  check_pointer(a.lse, "lse");
  check_pointer(a.entropy, "entropy");
  for (int64_t i = 0; i < a.m; ++i)
    if (a.ids[i] != a.ignore_index && (a.ids[i] < 0 || a.ids[i] >= a.v))
      reject("ids", std::to_string(a.ids[i]) + " in row " + std::to_string(i),
             ("0 <= id < " + std::to_string(a.v) + " or ignore_index").c_str());
}

template <class Args, class Kernel>
void for_rows(const Args& a, int threads, Kernel kernel) {
  const bool repays = a.m * a.v >= 2 * kLogitsPerThread;
  parallel_for(a.m, repays ? threads : 1, [&](int64_t i) { kernel(a, i); });
}

}  // namespace

void token_log_prob(const TokenArgs& a, int threads) {
  check(a, threads);
  if (a.m > 0) check_pointer(a.log_prob, "log_prob");
  for_rows(a, threads, active_kernels().tokens->row);
}

void token_log_prob_backward(const TokenGradArgs& a, int threads) {
  check(a, threads);
  check_rows(a.grad_logits, "grad_logits", a.m);
  for_rows(a, threads, active_kernels().tokens->gradient_row);
}

}  // namespace editr2
