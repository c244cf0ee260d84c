#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <vector>

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

// A thread begins with a part of the tasks that lies in one piece, and helps with the parts of others when
// it is through. Neighbouring tasks read and write neighbouring memory: by turns, two threads would take
// the page faults of one page of a new result, and wait for one another in the kernel at each.
struct alignas(64) Part {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Share {
  const std::function<void(int64_t)>& task;
  std::vector<Part>& parts;
  std::atomic<size_t> arrived{0};

  static void drain(void* share) {
    Share& s = *static_cast<Share*>(share);
    const size_t count = s.parts.size(), first = s.arrived.fetch_add(1, std::memory_order_relaxed);
    for (size_t k = 0; k < count; ++k) {
      Part& part = s.parts[(first + k) % count];
      for (int64_t i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) s.task(i);
    }
  }
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  threads = std::min(threads, 256);
  const OpenMP run = threads > 1 && count > 1 ? openmp() : nullptr;
  if (run == nullptr) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::vector<Part> parts(static_cast<size_t>(std::min<int64_t>(threads, count)));
  const int64_t size = static_cast<int64_t>(parts.size());
  for (int64_t p = 0; p < size; ++p) {
    parts[static_cast<size_t>(p)].next = count / size * p + std::min(p, count % size);
    parts[static_cast<size_t>(p)].end = count / size * (p + 1) + std::min(p + 1, count % size);
  }
  Share share{task, parts};
  run(&Share::drain, &share, static_cast<unsigned>(threads), 0);
}

}  // namespace editr2
