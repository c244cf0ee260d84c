#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace editr2 {
namespace {

// GNU's name for "run this on a team"; LLVM's and Intel's runtimes have it too. Null where the process
// has none, and in a forked child, whose runtime believes in threads that do not exist there. Forks are
// watched for from the moment the module is loaded; for those before, see backends.py.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMP openmp() {
  static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return registered != 0 || forked.load() ? nullptr : found;
}

struct Share {
  const std::function<void(int64_t)>& task;
  const int64_t count;
  std::atomic<int64_t> next{0};

  static void drain(void* share) {
    Share& s = *static_cast<Share*>(share);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.task(i);
  }
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  threads = std::min(threads, 256);
  Share share{task, count};
  const OpenMP run = threads > 1 && count > 1 ? openmp() : nullptr;
  if (run != nullptr)
    run(&Share::drain, &share, static_cast<unsigned>(threads), 0);
  else
    Share::drain(&share);
}

}  // namespace editr2
