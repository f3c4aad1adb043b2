// One block of a CUDA kernel as fibers on one CPU thread.
//
// A fiber runs until it reaches a barrier or a warp collective and waits there until the others arrive; then any fiber
// that can go on is drawn at random. One warp at a time is a favourite, drawn first for 1 to 2^14 turns, so that some
// warps run far ahead of the others, as on a GPU they may. When no fiber can go on, the kernel is wrong: the error
// names kernel, block and threads, and the seed that repeats it.
#pragma once
#include <stdlib.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__  // wants to know about every change of stack
#include <sanitizer/asan_interface.h>
#define VITKERN_ENTER_FIBER(save, stack, size) __sanitizer_start_switch_fiber(save, stack, size)
#define VITKERN_ENTERED_FIBER(saved, stack, size) __sanitizer_finish_switch_fiber(saved, stack, size)
#define VITKERN_FRESH_STACK(stack, size) __asan_unpoison_memory_region(stack, size)
#else
#define VITKERN_ENTER_FIBER(save, stack, size) (void)(save)
#define VITKERN_ENTERED_FIBER(saved, stack, size) (void)(saved)
#define VITKERN_FRESH_STACK(stack, size) (void)(stack)
#endif

extern char __start_vitkern_shared[] __attribute__((weak));  // the linker's names for the ends of the section
extern char __stop_vitkern_shared[] __attribute__((weak));

namespace vitkern {
namespace emulator {

constexpr int kMultiprocessors = 2, kMaxBarriers = 16;
constexpr size_t kStackBytes = 256 * 1024;
inline std::vector<std::string> launched;  // kernels, since the tests asked
// Bytes under way to shared memory.
struct Copy { void* to; const void* from; uintptr_t bytes; int group; };
struct Thread {
  ucontext_t context;            // where it starts
  void* place[5];                // of __builtin_setjmp, where it goes on
  bool started = false;
  char* stack = nullptr;
  void* fake_stack = nullptr;    // of the address sanitizer
  const char* waits = nullptr;   // the barrier or collective it waits for
  int barrier_id = 0;
  uint32_t mask = 0;             // lanes that its collective waits for
  void* argument = nullptr;      // its part in the collective, on its own stack
  bool done = false;
  int group = 0;                 // cp.async groups closed so far
  std::vector<Copy> copies;
};
struct Barrier { int arrived = 0, sum = 0, result = 0; };
// The block that runs.
struct Block {
  std::string kernel;
  std::function<void()> body;
  std::vector<Thread> threads;
  Barrier barriers[kMaxBarriers];
  std::unique_ptr<unsigned char[]> shared;  // dynamic
  int shared_bytes = 0;
  int current = 0, favourite = 0;
  uint32_t turns = 0;  // that the favourite still has
  std::string error;
  ucontext_t host;
  void* host_fake_stack = nullptr;  // these three: of the address sanitizer
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
};
inline uint64_t seed = 1, random_state = 1;
inline Block* block = nullptr;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of the fibers, kept from launch to launch
inline uint32_t draw(uint32_t below) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return uint32_t((random_state * 0x2545F4914F6CDD1DULL >> 33) % below);
}
inline Thread& self() { return block->threads[block->current]; }

// Leaves the fiber for good and makes run() throw.
[[noreturn]] inline void fail(const std::string& what) {
  block->error = block->kernel + ", block " + std::to_string(blockIdx.x) + ", thread " +
                 std::to_string(block->current) + ": " + what + " (seed " + std::to_string(seed) + ")";
  VITKERN_ENTER_FIBER(nullptr, block->host_stack, block->host_stack_bytes);
  setcontext(&block->host);
  abort();
}

// The next fiber that can go on, or -1.
inline int choose() {
  const int count = int(block->threads.size()), warps = (count + 31) / 32;
  if (block->turns-- == 0) {
    block->favourite = int(draw(uint32_t(warps)));
    block->turns = 1u << draw(15);
  }
  for (int turn = 0; turn < warps; ++turn) {
    const int warp = (block->favourite + turn) % warps, lanes = count - warp * 32 < 32 ? count - warp * 32 : 32;
    const int start = int(draw(uint32_t(lanes)));
    const Thread* threads = &block->threads[warp * 32];
    for (int i = 0; i < lanes; ++i) {
      const int lane = start + i < lanes ? start + i : start + i - lanes;
      if (!threads[lane].done && !threads[lane].waits) return warp * 32 + lane;
    }
  }
  return -1;
}
inline bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
// What the threads wait for, when nobody can go on.
inline std::string stuck() {
  std::string text = "nobody can go on, a barrier or collective was reached by part of the block or warp:", last;
  for (size_t i = 0; i < block->threads.size(); ++i) {
    const Thread& t = block->threads[i];
    const std::string now = t.done ? "has finished" : std::string("waits at ") + t.waits;
    if (now != last) text += " thread " + std::to_string(i) + " " + now + ";";
    last = now;
  }
  return text;
}
inline Thread& next_fiber(int to) {
  block->current = to;
  threadIdx = {uint32_t(to), 0, 0};
  return block->threads[to];
}

// Goes on with a fiber and does not return. Unlike swapcontext it makes no system call; it is not declared noreturn, or
// the address sanitizer would forget the whole stack that is left.
__attribute__((noinline, no_sanitize("address"))) inline void enter(Thread& t) {
  if (t.started) __builtin_longjmp(t.place, 1);
  t.started = true;
  setcontext(&t.context);
}
// Gives the CPU to another fiber; returns when this one is drawn again.
inline void yield() {
  const int from = block->current, to = choose();
  if (to < 0) fail(stuck());
  if (to == from) return;
  Thread &a = block->threads[from], &b = next_fiber(to);
  VITKERN_ENTER_FIBER(&a.fake_stack, b.stack, kStackBytes);
  if (__builtin_setjmp(a.place) == 0) enter(b);
  VITKERN_ENTERED_FIBER(self().fake_stack, nullptr, nullptr);
}
// Waits until `count` threads have come to barrier `id`; returns the sum of their values.
inline int barrier(const char* name, int id, int count, int value) {
  if (id < 0 || id >= kMaxBarriers) fail(std::string(name) + ": barriers are numbered 0 to 15");
  Barrier& b = block->barriers[id];
  b.sum += value;
  Thread& me = self();
  me.waits = name, me.mask = 0, me.barrier_id = id;
  if (++b.arrived == count) {
    b.result = b.sum, b.arrived = b.sum = 0;
    for (Thread& t : block->threads)
      if (t.waits && t.mask == 0 && t.barrier_id == id) {
        if (!same(t.waits, name)) fail(std::string(name) + " meets " + t.waits);
        t.waits = nullptr;
      }
  }
  yield();
  return b.result;
}
// Waits until every lane of `mask` has come to the collective `name`; the last to come runs
// execute(parts[32]) for all of them (null where a lane takes no part).
template <class Part, class Execute>
void warp_collective(const char* name, uint32_t mask, Part* mine, Execute execute) {
  const int first = block->current / 32 * 32, count = int(block->threads.size());
  if (!(mask >> (block->current - first) & 1)) fail(std::string(name) + ": the mask leaves out its own lane");
  Thread& me = self();
  me.waits = name, me.mask = mask, me.argument = mine;
  Part* parts[32] = {};
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1) || first + lane >= count) continue;
    const Thread& t = block->threads[first + lane];
    if (t.done || (t.waits && (!same(t.waits, name) || t.mask != mask)))
      fail(std::string(name) + " was reached by part of the warp: thread " + std::to_string(first + lane) +
           (t.done ? " has finished" : std::string(" waits at ") + t.waits));
    complete = complete && t.waits;
    parts[lane] = static_cast<Part*>(t.argument);
  }
  if (complete) {
    execute(parts);
    for (int lane = 0; lane < 32; ++lane)
      if (parts[lane]) block->threads[first + lane].waits = nullptr;
  }
  yield();
}
// The body of every fiber.
inline void fiber_main() {
  const void* before = nullptr;  // the stack that was left: of the host, in the first fiber
  size_t bytes = 0;
  VITKERN_ENTERED_FIBER(nullptr, &before, &bytes);
  if (!block->host_stack) block->host_stack = before, block->host_stack_bytes = bytes;
  block->body();
  Thread& me = self();
  if (!me.copies.empty()) fail("finished while a cp.async was under way");
  me.done = true;
  const int to = choose();
  if (to >= 0) {
    Thread& next = next_fiber(to);
    VITKERN_ENTER_FIBER(nullptr, next.stack, kStackBytes);
    enter(next);
  }
  for (const Thread& t : block->threads)
    if (!t.done) fail(stuck());
  VITKERN_ENTER_FIBER(nullptr, block->host_stack, block->host_stack_bytes);
  setcontext(&block->host);
}
inline void run_block(Block& b) {
  b.shared.reset(new unsigned char[b.shared_bytes]);  // 16-byte aligned, exact: one byte beyond is an error
  memset(b.shared.get(), 0xFF, size_t(b.shared_bytes));
  if (__start_vitkern_shared)
    memset(__start_vitkern_shared, 0xFF, size_t(__stop_vitkern_shared - __start_vitkern_shared));
  for (Barrier& barrier : b.barriers) barrier = Barrier();
  for (Thread& t : b.threads) {
    t.started = t.done = false, t.group = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber_main, 0);
    t.context.uc_stack.ss_size = 0;  // or the address sanitizer forgets the whole stack at every switch
  }
  block = &b;
  Thread& start = next_fiber(choose());
  VITKERN_ENTER_FIBER(&b.host_fake_stack, start.stack, kStackBytes);
  start.started = true;
  swapcontext(&b.host, &start.context);
  VITKERN_ENTERED_FIBER(b.host_fake_stack, nullptr, nullptr);
  block = nullptr;
  if (b.error.empty()) return;
  for (Thread& t : b.threads) VITKERN_FRESH_STACK(t.stack, kStackBytes);  // its functions did not return
  throw std::runtime_error("CUDA emulator: " + b.error);
}
// Runs a kernel: its blocks one after the other, in random order.
inline void run(const char* kernel, int64_t blocks, int threads, int shared_bytes, std::function<void()> body) {
  random_state = seed * 0x9E3779B97F4A7C15ULL + 1;
  launched.push_back(kernel);
  Block b;
  b.kernel = kernel, b.body = std::move(body), b.shared_bytes = shared_bytes;
  b.threads = std::vector<Thread>(size_t(threads));
  for (int i = int(stacks.size()); i < threads; ++i) stacks.emplace_back(new char[kStackBytes]);
  for (int i = 0; i < threads; ++i) b.threads[i].stack = stacks[i].get();
  gridDim = {uint32_t(blocks), 1, 1};
  blockDim = {uint32_t(threads), 1, 1};
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < blocks; ++i) order.insert(order.begin() + draw(i + 1), i);
  for (uint32_t i : order) {
    blockIdx = {i, 0, 0};
    run_block(b);
  }
}

}  // namespace emulator
}  // namespace vitkern
