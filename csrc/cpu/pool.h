// Threads: those of the OpenMP runtime that torch brought into the process, found by name, so that
// nothing is linked. Threads of our own would share the cores with torch's, which spin for a while after
// every operator of torch's: docs/measured.md has the figures.
#pragma once

#include <cstdint>
#include <functional>

namespace editr2 {

// Runs task(0) ... task(count - 1) on `threads` threads, the caller among them; tasks are handed out in
// order, one at a time. Tasks must not throw. On the caller alone for one task or one thread, where the
// process has no OpenMP runtime, and in a forked child.
//
// Ask for one thread or for all that torch uses, whatever the work: GNU's runtime ends and creates
// threads whenever a team is not as large as the one before.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace editr2
