// Runs a CUDA kernel's own source on one CPU core: a fiber for each CUDA thread, one thread block at a time.
// Barriers are real: a fiber waits until every live thread of its block (or warp) has arrived, and a barrier that
// cannot be completed aborts. Included before the kernel: g++ -x c++ -include cuda_on_cpu.h kernel.cu
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace simt {

struct Index { unsigned x, y, z; };
enum class State { ready, at_warp_barrier, at_block_barrier, done };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  State state;
  float exchanged;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline Index thread_index, block_index, block_size, grid_size;

inline void wait(State state) {
  const unsigned self = current;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
}

// Lets the block's other threads run: for loops that wait for another GPU.
inline void yield() { wait(State::ready); }

inline void enter() {
  body();
  wait(State::done);
}

// Releases the fibers [begin, end) if all that are not done wait at `barrier`.
inline bool release(unsigned begin, unsigned end, State barrier) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state == State::done) continue;
    if (fibers[i].state != barrier) return false;
    any = true;
  }
  for (unsigned i = begin; any && i < end; ++i)
    if (fibers[i].state == barrier) fibers[i].state = State::ready;
  return any;
}

inline void run_block() {
  const unsigned threads = unsigned(fibers.size());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state != State::ready) continue;
      current = i;
      thread_index = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::done; })) return;
    bool released = std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::ready; });
    released |= release(0, threads, State::at_block_barrier);
    for (unsigned warp = 0; warp < threads; warp += 32)
      released |= release(warp, std::min(warp + 32, threads), State::at_warp_barrier);
    if (!released) {
      std::fprintf(stderr, "deadlock: the threads of a block wait at different barriers\n");
      std::abort();
    }
  }
}

// Like cuLaunchKernel: `values` points to one pointer for each argument.
template <class... A, size_t... I>
void launch(void (*kernel)(A...), Index grid, unsigned threads, void** values, std::index_sequence<I...>) {
  body = [=] { kernel(*static_cast<A*>(values[I])...); };
  fibers.resize(threads);
  block_size = {threads, 1, 1};
  grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block();
      }
}

template <class... A> void launch(void (*kernel)(A...), Index grid, unsigned threads, void** values) {
  launch(kernel, grid, threads, values, std::index_sequence_for<A...>{});
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

inline void __syncthreads() { simt::wait(simt::State::at_block_barrier); }
inline void __syncwarp() { simt::wait(simt::State::at_warp_barrier); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned self = simt::current;
  simt::fibers[self].exchanged = value;
  __syncwarp();
  const float other = simt::fibers[self ^ unsigned(mask)].exchanged;
  __syncwarp();
  return other;
}

inline float __int_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

using std::min;
inline long long min(long long a, long long b) { return a < b ? a : b; }
