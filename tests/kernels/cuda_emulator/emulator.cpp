// Runs CUDA kernels that were compiled as C++ on the CPU: correctness without a GPU, not speed.
//
// The threads of a block are fibers on one system thread; each runs until it waits (a barrier, a shuffle)
// or returns. Blocks run in a shuffled order, shared memory is NaN before each, and the order of the
// threads between two waits is settable: bits that depend on either are a race. Threads that wait at
// different places, and threads that wait for one that has returned, are an error.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_shim.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern char __start_editr2_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_editr2_shared[] __attribute__((weak, visibility("hidden")));

// Saves the callee-saved registers and the stack pointer, then goes on where `to` was saved.
extern "C" void editr2_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.hidden editr2_switch
.globl editr2_switch
.type editr2_switch, @function
editr2_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size editr2_switch, .-editr2_switch
)");
constexpr size_t kSaved = 6, kReturn = 6;  // words; the return address lies above the registers
#elif defined(__aarch64__)
asm(R"(
.text
.hidden editr2_switch
.globl editr2_switch
.type editr2_switch, %function
editr2_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size editr2_switch, .-editr2_switch
)");
constexpr size_t kSaved = 20, kReturn = 11;
#else
#error "the CUDA emulator switches stacks on x86-64 and AArch64 only"
#endif

namespace editr2_emulator {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32;
enum class State { kReady, kBarrier, kExchange, kDone };

struct Fiber {
  void* sp = nullptr;
  unsigned char* stack = nullptr;
  State state = State::kDone;
  Dim3 index;
  const char* file = nullptr;
  int line = 0;
  uint64_t bits = 0;
  int kind = 0, lanes = 0;
};

std::mutex one_launch;
std::vector<Fiber> fibers;
Fiber* current = nullptr;
void* scheduler_sp = nullptr;
Dim3 block_at, block_dim, grid_dim;
const std::function<void()>* kernel_body = nullptr;
std::exception_ptr thrown;
unsigned order_seed = 1;  // 0: blocks and threads in order
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
#endif

void to_fiber(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
  editr2_switch(&scheduler_sp, fiber.sp);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  editr2_switch(&scheduler_sp, fiber.sp);
#endif
}

void to_scheduler(bool last) {
  Fiber* me = current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_size);
  editr2_switch(&me->sp, scheduler_sp);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#else
  (void)last;
  editr2_switch(&me->sp, scheduler_sp);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  try {
    (*kernel_body)();
  } catch (...) {
    if (!thrown) thrown = std::current_exception();
  }
  current->state = State::kDone;
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber, Dim3 index) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<unsigned char*>(std::aligned_alloc(64, kStack));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);  // frames of a fiber that never returned from them
#endif
  uint64_t* top = reinterpret_cast<uint64_t*>(fiber.stack + kStack) - 2;
#if defined(__x86_64__)
  top -= 1;  // a function starts with rsp 8 below a multiple of 16
  *top = 0;
#endif
  uint64_t* frame = top - kSaved - (kSaved == 6 ? 1 : 0);
  std::memset(frame, 0, sizeof(uint64_t) * static_cast<size_t>(top - frame));
  frame[kReturn] = reinterpret_cast<uint64_t>(&fiber_main);
  fiber.sp = frame;
  fiber.state = State::kReady;
  fiber.index = index;
}

std::string where(const Fiber& f) {
  const unsigned flat = f.index.x + block_dim.x * (f.index.y + block_dim.y * f.index.z);
  std::string text = "thread " + std::to_string(flat);
  if (f.state == State::kDone) return text + " returned";
  return text + (f.state == State::kBarrier ? " waits in __syncthreads at " : " waits in a warp exchange at ") +
         f.file + ":" + std::to_string(f.line);
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.line == b.line && std::strcmp(a.file, b.file) == 0 && a.kind == b.kind &&
         (a.lanes == b.lanes || a.kind == 'i');
}

// Lets the lanes of one warp go on if all of them wait in the same exchange.
bool serve_warp(size_t first, size_t threads) {
  const size_t end = std::min(first + kWarp, threads);
  for (size_t t = first; t < end; ++t)
    if (fibers[t].state != State::kExchange) return false;
  for (size_t t = first; t < end; ++t)
    if (!same_place(fibers[first], fibers[t]))
      throw std::runtime_error("lanes of a warp diverge: " + where(fibers[first]) + ", " + where(fibers[t]));
  uint64_t given[kWarp], any = 0;
  for (size_t t = first; t < end; ++t) any |= given[t - first] = fibers[t].bits;
  for (size_t t = first; t < end; ++t) {
    Fiber& f = fibers[t];
    const int lane = static_cast<int>(t - first);
    const int from = f.kind == 'x' ? lane ^ f.lanes : f.kind == 'd' ? lane + f.lanes : f.kind == 'i' ? f.lanes : lane;
    const int own = f.kind == 'i' ? from & (kWarp - 1) : from < kWarp ? from : lane;
    if (first + static_cast<size_t>(own) >= end) throw std::runtime_error("a shuffle reads an absent lane");
    f.bits = f.kind == 'a' ? any : given[own];
    f.state = State::kReady;
  }
  return true;
}

void run_block(std::mt19937& random) {
  const size_t threads = static_cast<size_t>(block_dim.x) * block_dim.y * block_dim.z;
  if (fibers.size() < threads) fibers.resize(threads);
  for (char* p = __start_editr2_shared; p != nullptr && p < __stop_editr2_shared; ++p) *p = '\xFF';
  size_t t = 0;
  for (unsigned z = 0; z < block_dim.z; ++z)
    for (unsigned y = 0; y < block_dim.y; ++y)
      for (unsigned x = 0; x < block_dim.x; ++x) prepare(fibers[t++], Dim3(x, y, z));
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), size_t{0});
  for (;;) {
    if (order_seed) std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (const size_t i : order)
      if (fibers[i].state == State::kReady) {
        to_fiber(fibers[i]);
        ran = true;
        if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
      }
    bool served = false;
    for (size_t warp = 0; warp < threads; warp += kWarp) served = serve_warp(warp, threads) || served;
    if (ran || served) continue;
    size_t done = 0, waiting = 0, other = 0;
    const Fiber* first = nullptr;
    for (t = 0; t < threads; ++t) {
      done += fibers[t].state == State::kDone;
      if (fibers[t].state == State::kBarrier && (first == nullptr || same_place(*first, fibers[t]))) {
        if (first == nullptr) first = &fibers[t];
        ++waiting;
      } else {
        other = t;
      }
    }
    if (done == threads) return;
    if (waiting != threads) {
      if (first == nullptr)
        for (t = 0; t < threads; ++t)
          if (fibers[t].state == State::kExchange) first = &fibers[t];
      for (t = 0; t < threads; ++t)
        if (!same_place(*first, fibers[t])) other = t;
      throw std::runtime_error("threads of a block wait for each other: " + where(*first) + ", " +
                               where(fibers[other]));
    }
    for (t = 0; t < threads; ++t) fibers[t].state = State::kReady;
  }
}

}  // namespace

const Dim3& thread_index() { return current->index; }
const Dim3& block_index() { return block_at; }
const Dim3& block_size() { return block_dim; }
const Dim3& grid_size() { return grid_dim; }

void fail(const char* file, int line, const char* what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

void barrier(const char* file, int line) {
  current->file = file, current->line = line, current->kind = 0, current->lanes = 0;
  current->state = State::kBarrier;
  to_scheduler(false);
}

uint64_t exchange(const char* file, int line, uint64_t bits, int kind, int lanes) {
  current->file = file, current->line = line, current->bits = bits, current->kind = kind, current->lanes = lanes;
  current->state = State::kExchange;
  to_scheduler(false);
  return current->bits;
}

void launch(const char* kernel, Dim3 grid, Dim3 block, size_t shared, void*, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const bool legal = threads >= 1 && threads <= 1024 && blocks >= 1 && grid.x <= 0x7FFFFFFFu && grid.y <= 65535 &&
                     grid.z <= 65535 && shared <= 48 * 1024;
  if (!legal) throw std::runtime_error(std::string(kernel) + ": invalid launch configuration");
  block_dim = block, grid_dim = grid, kernel_body = &body;
  std::mt19937 random(order_seed);
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (order_seed) std::shuffle(order.begin(), order.end(), random);
  for (const size_t i : order) {
    block_at = Dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    try {
      run_block(random);
    } catch (const std::exception& error) {
      thrown = nullptr;
      throw std::runtime_error(std::string(kernel) + ": " + error.what());
    }
  }
}

}  // namespace editr2_emulator

// For tests, through ctypes: the order in which blocks and threads run; 0 is in order.
extern "C" __attribute__((visibility("default"))) void editr2_emulator_order(unsigned seed) {
  const std::lock_guard<std::mutex> lock(editr2_emulator::one_launch);
  editr2_emulator::order_seed = seed;
}
