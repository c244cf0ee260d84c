// Threads: those of the OpenMP runtime that torch brought into the process, found by name, so that
// nothing is linked. Threads of our own would share the cores with torch's, which spin for a while after
// every operator of torch's: measured, half of the second core.
#pragma once

#include <cstdint>
#include <functional>

namespace editr2 {

// Runs task(0) ... task(count - 1) on up to `threads` threads, the caller among them; tasks are handed
// out in order, one at a time. Tasks must not throw. On the caller alone where the process has no OpenMP
// runtime, and in a forked child.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace editr2
