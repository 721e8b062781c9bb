// Fibers, warps, blocks and clusters, and who runs next (see simt.h).
#include "machine.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace simt {

thread_local Machine machine;
thread_local Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kIdleRounds = 1000;  // that threads in a loop get to see what they wait for
thread_local std::string message;

u64 next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random >> 11;
}

// ---- Fibers

void thread_ended();

void enter() {
  for (;;) {
    machine.call(machine.values);
    thread_ended();
    suspend(Wait::done);
  }
}

std::unique_ptr<Fiber[]> new_fibers() {
  auto fibers = std::make_unique<Fiber[]>(32);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, 32 * kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stacks of a warp");
  for (unsigned i = 0; i < 32; ++i) fibers[i].stack = static_cast<u8*>(memory) + i * kStackBytes;
  return fibers;
}

// Returns when the fiber waits or has ended.
__attribute__((noinline)) void resume(Fiber& fiber) {
  machine.current = &fiber;
  watched = machine.history.on ? &fiber : nullptr;
  thread_index = {fiber.thread, 0, 0};
  if (_setjmp(machine.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    static thread_local ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack;
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, enter, 0);
    setcontext(&start);
  }
  machine.current = watched = nullptr;
}

// ---- __shared__ variables: one place, whose content goes with the block

struct Search { const void* code; };

int find_variables(dl_phdr_info* info, size_t, void* search) {
  bool here = false;
  const ElfW(Phdr)* variables = nullptr;
  for (unsigned i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    const ElfW(Addr) address = ElfW(Addr)(static_cast<Search*>(search)->code) - info->dlpi_addr;
    if (part.p_type == PT_LOAD && address >= part.p_vaddr && address < part.p_vaddr + part.p_memsz) here = true;
    if (part.p_type == PT_TLS) variables = &part;
  }
  if (!here) return 0;
  machine.variables = static_cast<u8*>(variables && info->dlpi_tls_data ? info->dlpi_tls_data : nullptr);
  machine.variable_bytes = machine.variables ? unsigned(variables->p_memsz) : 0;
  return 1;
}

void load_variables(Block& block) {
  if (machine.loaded == &block) return;
  if (machine.loaded) std::memcpy(machine.loaded->statics.data(), machine.variables, machine.variable_bytes);
  std::memcpy(machine.variables, block.statics.data(), machine.variable_bytes);
  machine.loaded = &block;
}

// ---- What threads wait for

void complete_meeting(Warp& warp, unsigned mask) {
  Lanes lanes = {{}, mask};
  const Fiber* one = nullptr;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& fiber = warp.fibers[i];
    if (!one) one = &fiber;
    if (fiber.complete != one->complete || std::strcmp(fiber.what, one->what) != 0)
      fail("lanes of one warp are at %s and at %s", one->what, fiber.what);
    lanes.brought[i] = fiber.brought;
  }
  one->complete(lanes);
  warp.meeting &= ~mask;
  ++machine.events;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && &warp.fibers[i] != machine.current) wake(warp.fibers[i]);
}

template <class F> void for_each_fiber(Block& block, F&& f) {
  for (Warp& warp : block.warps)
    for (unsigned i = 0; i < 32 && warp.first + i < machine.launch.threads; ++i) f(warp.fibers[i]);
}

void release_named(Block& block, unsigned number) {
  NamedBarrier& barrier = block.named[number];
  barrier.arrived = 0;
  barrier.verdict = std::exchange(barrier.any, false);
  ++machine.events;
  for_each_fiber(block, [&](Fiber& fiber) {
    if (fiber.wait == Wait::block && fiber.number == number && &fiber != machine.current) wake(fiber);
  });
}

void release_cluster(Cluster& cluster) {
  cluster.at_barrier = 0;
  ++machine.events;
  for (Block& block : cluster.blocks)
    for_each_fiber(block, [&](Fiber& fiber) {
      if (fiber.wait == Wait::cluster && &fiber != machine.current) wake(fiber);
    });
}

void thread_ended() {
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  Block& block = *warp.block;
  ++machine.events;
  fiber.wait = Wait::done;
  warp.live &= ~(1u << fiber.thread % 32);
  if (warp.live == 0 && !warp.products.empty()) fail("a warp ended with a wgmma that it did not wait for");
  if (warp.meeting) {
    const unsigned mask = warp.fibers[__builtin_ctz(warp.meeting)].mask & warp.live;
    if ((warp.meeting & mask) == mask) complete_meeting(warp, mask);
  }
  --block.live, --block.cluster->live;
  for (unsigned number = 0; number < 16; ++number) {
    const NamedBarrier& barrier = block.named[number];
    if (barrier.arrived && barrier.expected == kAllThreads && barrier.arrived == block.live)
      release_named(block, number);
  }
  Cluster& cluster = *block.cluster;
  if (cluster.at_barrier && cluster.at_barrier == cluster.live) release_cluster(cluster);
}

// ---- Who runs

void run_warp(Warp& warp) {
  load_variables(*warp.block);
  block_index = warp.block->index;
  do {
    const unsigned start = unsigned(next_random()) % 32;
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned lane = (start + i) % 32;
      if (!(warp.ready >> lane & 1)) continue;
      warp.ready &= ~(1u << lane);
      resume(warp.fibers[lane]);
    }
  } while (warp.ready && !machine.doze && !chance(8));
  if (warp.ready && !warp.queued) {
    warp.queued = true;
    (machine.doze || chance(4) ? machine.asleep : machine.runnable).push_back(&warp);
  }
  machine.doze = false;
}

void wake_spinning() {
  std::vector<Fiber*> spinning;
  spinning.swap(machine.spinning);
  for (Fiber* fiber : spinning) wake(*fiber);
}

// The next cluster of the grid, in the place of one that has ended.
void start(Cluster& cluster, unsigned number) {
  const Launch& launch = machine.launch;
  cluster.running = true;
  cluster.live = launch.cluster * launch.threads;
  cluster.at_barrier = 0;
  const unsigned warps = (launch.threads + 31) / 32;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Block& block = cluster.blocks[rank];
    if (machine.loaded == &block) machine.loaded = nullptr;
    const unsigned at = number * launch.cluster + rank;
    block.cluster = &cluster;
    block.index = {at % launch.grid.x, at / launch.grid.x % launch.grid.y, at / launch.grid.x / launch.grid.y};
    block.rank = rank;
    block.waited = block.triggered_early = false;
    block.live = launch.threads;
    if (block.memory) std::memset(block.memory, 0xff, launch.shared);
    block.unfenced.assign((launch.shared + 3) / 4, 0);
    block.statics.assign(machine.variable_bytes, 0xff);
    std::fill(std::begin(block.named), std::end(block.named), NamedBarrier{0, 0});
    for (unsigned w = 0; w < warps; ++w) {
      Warp& warp = block.warps[w];
      warp.block = &block;
      warp.first = w * 32;
      const unsigned lanes = std::min(32u, launch.threads - w * 32);
      warp.live = warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
      warp.meeting = warp.groups = 0;
      clear_products(warp);
      for (unsigned i = 0; i < lanes; ++i) {
        Fiber& fiber = warp.fibers[i];
        fiber.warp = &warp;
        fiber.thread = w * 32 + i;
        fiber.wait = Wait::nothing;
        fiber.unfenced.clear();
        fiber.waited = !launch.early || !machine.history.on;
      }
      warp.queued = true;
      machine.runnable.push_back(&warp);
    }
  }
}

void check_ended(const Cluster& cluster) {
  for (const Copy& copy : machine.copies)
    if (copy.block->cluster == &cluster) fail("a block ended with a copy into its memory under way");
}

void append(std::string& text, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string& text, const char* format, ...) {
  char line[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  text += line;
}

std::string waits_for(Block& block, const Fiber& fiber) {
  std::string text;
  char barrier[200];
  switch (fiber.wait) {
    case Wait::warp: append(text, "%s of lanes %08x", fiber.what, fiber.mask); break;
    case Wait::block:
      append(text, "barrier %u of the block, %u of %u there", fiber.number, block.named[fiber.number].arrived,
             block.named[fiber.number].expected == kAllThreads ? block.live : block.named[fiber.number].expected);
      break;
    case Wait::cluster: append(text, "the cluster's barrier"); break;
    case Wait::mbarrier:
      describe_mbarrier(block, fiber.barrier, barrier, sizeof barrier);
      append(text, "phase with parity %u of %s", fiber.parity, barrier);
      break;
    case Wait::spin: append(text, "another thread's write, in a loop"); break;
    case Wait::nothing:
    case Wait::done: break;
  }
  return text;
}

// All that wait, a line for each warp and thing.
[[noreturn]] void deadlock() {
  std::string text = "deadlock:";
  for (const auto& cluster : machine.clusters)
    for (Block& block : cluster->blocks)
      for (Warp& warp : block.warps)
        for (unsigned i = 0, seen = 0; i < 32 && warp.first + i < machine.launch.threads; ++i) {
          if (seen >> i & 1 || warp.fibers[i].wait == Wait::done) continue;
          const std::string what = waits_for(block, warp.fibers[i]);
          unsigned lanes = 0;
          for (unsigned j = i; j < 32 && warp.first + j < machine.launch.threads; ++j)
            if (warp.fibers[j].wait == warp.fibers[i].wait && waits_for(block, warp.fibers[j]) == what) lanes |= 1u << j;
          seen |= lanes;
          if (text.size() < 8000)
            append(text, "\nblock %u,%u,%u warp %u lanes %08x: %s", block.index.x, block.index.y, block.index.z,
                   warp.first / 32, lanes, what.c_str());
        }
  message = text;
  _longjmp(machine.failed, 1);
}

void prepare(unsigned places) {
  const Launch& launch = machine.launch;
  const unsigned warps = (launch.threads + 31) / 32;
  unsigned used = 0;
  machine.clusters.clear();
  for (unsigned place = 0; place < places; ++place) {
    machine.clusters.push_back(std::make_unique<Cluster>());
    machine.clusters.back()->blocks.resize(launch.cluster);
    for (Block& block : machine.clusters.back()->blocks) {
      block.memory = launch.shared ? static_cast<u8*>(std::aligned_alloc(1024, variables_begin() - kShared)) : nullptr;
      block.warps.resize(warps);
      for (Warp& warp : block.warps) {
        if (used == machine.fibers.size()) machine.fibers.push_back(new_fibers());
        warp.fibers = machine.fibers[used++].get();
        for (unsigned i = 0; i < 32; ++i) warp.fibers[i].wait = Wait::done;
      }
    }
  }
}

void run_all() {
  const Launch& launch = machine.launch;
  if (launch.grid.x % launch.cluster != 0) fail("a grid of %u blocks for clusters of %u", launch.grid.x, launch.cluster);
  const unsigned total = launch.grid.x * launch.grid.y * launch.grid.z / launch.cluster;
  const unsigned places = std::min(total, std::max(1u, launch.resident / launch.cluster));
  prepare(places);
  unsigned started = 0, ended = 0, idle = 0;
  for (auto& cluster : machine.clusters) start(*cluster, started++);
  for (u64 seen = 0;;) {
    if (!machine.runnable.empty()) {
      const unsigned at = choice(unsigned(machine.runnable.size()));
      Warp& warp = *machine.runnable[at];
      machine.runnable[at] = machine.runnable.back();
      machine.runnable.pop_back();
      warp.queued = false;
      run_warp(warp);
      Cluster& cluster = *warp.block->cluster;
      if (cluster.live == 0 && cluster.running) {
        cluster.running = false;
        check_ended(cluster);
        for (const Block& block : cluster.blocks) block_ended(block);
        ++ended;
        if (started < total) start(cluster, started++);
      }
      if (launch.asynchrony == Asynchrony::random && chance(4)) {
        if (chance(2)) perform_some_copy();
        else perform_some_product();
      }
      if (!machine.spinning.empty() && chance(16)) wake_spinning();
    } else if (ended == total) {
      return;
    } else if (!machine.asleep.empty() && !machine.spinning.empty() && !chance(4)) {
      wake_spinning();
    } else if (!machine.asleep.empty() && (machine.copies.empty() || chance(2))) {
      std::swap(machine.asleep[choice(unsigned(machine.asleep.size()))], machine.asleep.back());
      machine.runnable.push_back(machine.asleep.back());
      machine.asleep.pop_back();
    } else if (!machine.spinning.empty() && seen != machine.events) {
      seen = machine.events;
      idle = 0;
      wake_spinning();
    } else if (!machine.copies.empty()) {
      perform_some_copy();
    } else if (!machine.spinning.empty() && ++idle < kIdleRounds) {
      wake_spinning();
    } else {
      deadlock();
    }
  }
}

}  // namespace

Fiber::~Fiber() {
  if (stack) munmap(stack, kStackBytes);
}

bool chance(unsigned one_in) { return next_random() % one_in == 0; }
unsigned choice(unsigned bound) { return unsigned(next_random() % bound); }

void wake(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  fiber.wait = Wait::nothing;
  warp.ready |= 1u << fiber.thread % 32;
  if (warp.queued) return;
  warp.queued = true;
  machine.runnable.push_back(&warp);
}

__attribute__((noinline)) void suspend(Wait wait) {
  machine.current->wait = wait;
  if (_setjmp(machine.current->context) == 0) _longjmp(machine.scheduler, 1);
}

void fail(const char* format, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = text;
  if (machine.current) {
    const Index& block = this_block().index;
    append(message, " (block %u,%u,%u thread %u)", block.x, block.y, block.z, machine.current->thread);
  }
  _longjmp(machine.failed, 1);
}

void meet(const char* what, unsigned mask, void* mine, void (*complete)(const Lanes&)) {
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  const unsigned bit = 1u << fiber.thread % 32;
  if (!(mask & bit)) fail("%s of lanes %08x, called by another lane", what, mask);
  fiber.what = what, fiber.mask = mask, fiber.brought = mine, fiber.complete = complete;
  warp.meeting |= bit;
  mask &= warp.live;
  if ((warp.meeting & mask) == mask) complete_meeting(warp, mask);
  else suspend(Wait::warp);
}

void give_way() {
  if (!chance(4)) return;
  Fiber& fiber = *machine.current;
  machine.doze = true;
  fiber.warp->ready |= 1u << fiber.thread % 32;
  suspend(Wait::nothing);
}

unsigned lane() { return machine.current->thread % 32; }

void block_barrier(unsigned number, unsigned threads) { block_barrier_any(number, threads, false); }

bool block_barrier_any(unsigned number, unsigned threads, bool mine) {
  if (number > 15) fail("there is no barrier %u", number);
  if (threads % 32 != 0) fail("barrier %u of %u threads, which are no whole warps", number, threads);
  Block& block = this_block();
  NamedBarrier& barrier = block.named[number];
  if (barrier.arrived && barrier.expected != threads)
    fail("barrier %u is entered for %u threads and for %u", number, barrier.expected, threads);
  barrier.expected = threads;
  barrier.any |= mine;
  if (++barrier.arrived == (threads == kAllThreads ? block.live : threads)) {
    release_named(block, number);
  } else {
    machine.current->number = number;
    suspend(Wait::block);
  }
  return barrier.verdict;
}

void cluster_barrier() {
  Cluster& cluster = *this_block().cluster;
  if (++cluster.at_barrier == cluster.live) release_cluster(cluster);
  else suspend(Wait::cluster);
}

unsigned cluster_rank() { return this_block().rank; }

void spin() {
  machine.spinning.push_back(machine.current);
  suspend(Wait::spin);
}

void wait_outside() {
  ++machine.events;  // so that it is never a deadlock of this GPU's
  spin();
}

u8* dynamic_shared() { return this_block().memory; }

u32 shared_address(const void* p) {
  const u8* at = static_cast<const u8*>(p);
  const u8* dynamic = this_block().memory;
  if (at >= dynamic && at < dynamic + machine.launch.shared) return kShared + u32(at - dynamic);
  if (at >= machine.variables && at < machine.variables + machine.variable_bytes)
    return variables_begin() + u32(at - machine.variables);
  fail("%p is not in this block's shared memory", p);
}

u8* resolve(Block& block, u32 address, unsigned bytes, unsigned align) {
  if (address % align != 0) fail("shared address %#x is not a multiple of %u", address, align);
  if (address >= kShared && u64(address) + bytes <= kShared + u64(machine.launch.shared))
    return block.memory + (address - kShared);
  const u32 variables = variables_begin();
  if (address < variables || u64(address) + bytes > variables + u64(machine.variable_bytes))
    fail("shared memory at %#x, %u bytes: the block has [%#x, %#x)", address, bytes, kShared,
         kShared + machine.launch.shared);
  return (machine.loaded == &block ? machine.variables : block.statics.data()) + (address - variables);
}

u8* resolve_async(Block& block, u32 address, unsigned bytes, unsigned align) {
  u8* const memory = resolve(block, address, bytes, align);
  if (u64(address) + bytes <= kShared + u64(machine.launch.shared))
    for (u32 word = (address - kShared) / 4; word < (address - kShared + bytes) / 4; ++word)
      if (const unsigned thread = block.unfenced[word])
        fail("shared memory at %#x: thread %u has stored to it without fence.proxy.async", kShared + word * 4,
             thread - 1);
  return memory;
}

void* shared_for_store(u32 address, unsigned bytes, unsigned align) {
  Block& block = this_block();
  u8* const memory = resolve(block, address, bytes, align);
  Fiber& fiber = *machine.current;
  if (u64(address) + bytes <= kShared + u64(machine.launch.shared))
    for (u32 word = (address - kShared) / 4; word < (address - kShared + bytes) / 4; ++word) {
      block.unfenced[word] = (unsigned short)(1 + fiber.thread);
      fiber.unfenced.push_back(word);
    }
  return memory;
}

void fence_async_proxy() {
  Fiber& fiber = *machine.current;
  for (const u32 word : fiber.unfenced) {
    unsigned short& mark = this_block().unfenced[word];
    if (mark == 1 + fiber.thread) mark = 0;
  }
  fiber.unfenced.clear();
}

void* shared(u32 address, unsigned bytes, unsigned align) { return resolve(this_block(), address, bytes, align); }

const char* run(const Launch& launch, const void* variable, void (*call)(void**), void** values) {
  machine.launch = launch;
  machine.call = call, machine.values = values;
  machine.random = launch.seed * 2 + 1;
  machine.events = 0;
  machine.current = nullptr, machine.loaded = nullptr;
  block_size = {launch.threads, 1, 1};
  grid_size = launch.grid;
  message.clear();
  machine.copies.clear();
  machine.doze = false;
  machine.asleep.clear(), machine.runnable.clear(), machine.at_mbarriers.clear(), machine.spinning.clear();
  if (_setjmp(machine.failed) == 0) {
    Search search = {reinterpret_cast<const void*>(call)};
    dl_iterate_phdr(find_variables, &search);
    begin_launch(launch.early);
    run_all();
    if (machine.history.on && !machine.history.waited)
      fail("an early launch that waits for nothing: the next could not wait for what came before it");
  } else {
    machine.current = watched = nullptr;
    for (auto& fibers : machine.fibers)
      for (unsigned i = 0; i < 32; ++i) fibers[i].started = false;  // they are in the middle of the kernel
  }
  for (auto& cluster : machine.clusters)
    for (Block& block : cluster->blocks) std::free(block.memory);
  machine.clusters.clear();
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace simt

extern "C" const char* simt_run(const simt::Launch* launch, const void* variable, void (*call)(void**), void** values) {
  return simt::run(*launch, variable, call, values);
}
