// A small persistent thread pool. Our own rather than OpenMP: torch brings an OpenMP runtime, and a
// second one in the process oversubscribes the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace editr2 {

// Runs task(0) ... task(count - 1) on up to `threads` threads, the caller among them; tasks are
// handed out in order, one at a time. Tasks must not throw. A call made while another one holds the
// pool runs on its caller alone. After a fork the child starts with a fresh pool.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace editr2
