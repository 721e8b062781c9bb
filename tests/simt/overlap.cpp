// Programmatic dependent launch: what the kernels before a launch have stored is there when the launch waits for them,
// and not before.
//
// Launches are numbered and run one after another, but a thread of an early launch may not read, before its own wait,
// what a kernel wrote that might still run on a GPU; nor may it write, as that kernel might still read. Kernels are
// compiled as for the thread sanitizer, whose calls before each load and store are answered here.
#include "machine.h"

namespace simt {

namespace {

constexpr u64 kPage = std::tuple_size_v<decltype(History::pages)::mapped_type>;

// Of the thread or its block alone: its warp's stacks, variables and shared memory.
bool is_global(const Fiber& fiber, const void* p) {
  const auto within = [at = reinterpret_cast<u64>(p)](const void* first, u64 bytes) {
    return at - reinterpret_cast<u64>(first) < bytes;
  };
  const Warp& warp = *fiber.warp;
  return !within(warp.fibers[0].stack, 32 * kStackBytes) && !within(machine.variables, machine.variable_bytes) &&
         !within(warp.block->memory, machine.launch.shared);
}

}  // namespace

thread_local Fiber* watched;

void record(const void* to, u64 bytes) {
  History& history = machine.history;
  for (u64 at = reinterpret_cast<u64>(to), end = at + bytes; at < end;) {
    auto& page = history.pages[at / kPage];
    for (const u64 last = std::min(end, (at / kPage + 1) * kPage); at < last; ++at) page[at % kPage] = history.launch;
  }
}

void check_read(const void* from, u64 bytes) {
  const Fiber* const fiber = watched;
  if (!fiber || fiber->waited || !is_global(*fiber, from)) return;
  History& history = machine.history;
  for (u64 at = reinterpret_cast<u64>(from), end = at + bytes; at < end; ++at) {
    const auto page = history.pages.find(at / kPage);
    if (page == history.pages.end()) at |= kPage - 1;
    else if (const u32 writer = page->second[at % kPage]; writer > history.settled)
      fail("a read of %p before wait_for_previous_kernels: the kernel %u launches before may still be to store it",
           reinterpret_cast<void*>(at), history.launch - writer);
  }
}

void check_write(const void* to, u64 bytes) {
  const Fiber* const fiber = watched;
  if (!fiber || !is_global(*fiber, to)) return;
  if (!fiber->waited) fail("a store to %p before wait_for_previous_kernels", to);
  record(to, bytes);
}

void wait_for_previous_kernels() { machine.current->waited = this_block().waited = true; }

void let_next_kernel_start() { this_block().triggered_early |= !machine.current->waited; }

// The next launch starts when all blocks of this one have let it or have ended: if one of them waits before that, then
// what came before this launch has ended by then.
void block_ended(const Block& block) {
  machine.history.waited |= block.waited;
  machine.history.orderly |= block.waited && !block.triggered_early;
}

void begin_launch(bool early) {
  History& history = machine.history;
  if (!early) history.settled = history.launch;
  else if (history.orderly) history.settled = history.launch - 1;
  ++history.launch;
  history.waited = history.orderly = !early;
}

}  // namespace simt

// Whether launches overlap from here on. What was stored before is settled.
extern "C" void simt_overlap(bool on) {
  simt::machine.history = {};
  simt::machine.history.on = on;
}

// A kernel that this machine does not run, and that is not launched early.
extern "C" void simt_other_kernel() { simt::begin_launch(false); }

// The launch before has stored to these bytes.
extern "C" void simt_stored(const void* to, simt::u64 bytes) { simt::record(to, bytes); }

// What g++ -fsanitize=thread calls.

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, unsigned long bytes) { simt::check_read(p, bytes); }
void __tsan_write_range(void* p, unsigned long bytes) { simt::check_write(p, bytes); }
#define ACCESS(bytes)                                                               \
  void __tsan_read##bytes(void* p) { simt::check_read(p, bytes); }                  \
  void __tsan_write##bytes(void* p) { simt::check_write(p, bytes); }                \
  void __tsan_unaligned_read##bytes(void* p) { simt::check_read(p, bytes); }        \
  void __tsan_unaligned_write##bytes(void* p) { simt::check_write(p, bytes); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
#undef ACCESS
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int order) { return __atomic_load_n(p, order); }
unsigned __tsan_atomic32_load(const volatile unsigned* p, int) {
  simt::check_read(const_cast<const unsigned*>(p), 4);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
void __tsan_atomic32_store(volatile unsigned* p, unsigned x, int) {
  simt::check_write(const_cast<const unsigned*>(p), 4);
  __atomic_store_n(p, x, __ATOMIC_RELEASE);
}
}
