// mbarriers and the copy engine.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace simt {

namespace {

// An mbarrier, in the eight bytes that the kernel gives it. Fresh shared memory and zeros are none.
struct Mbarrier {
  u64 phase : 1, pending : 20, arrivals : 20;
  std::int64_t bytes : 22;  // still to come in this phase
  u64 poison : 1;
};
static_assert(sizeof(Mbarrier) == 8, "the hardware's size");

Mbarrier& find(Block& block, u32 address) {
  auto& barrier = *reinterpret_cast<Mbarrier*>(resolve(block, address, 8, 8));
  if (barrier.poison || barrier.arrivals == 0) fail("there is no mbarrier at %#x", address);
  return barrier;
}

bool passed(const Mbarrier& barrier, u32 parity) { return barrier.phase != (parity & 1); }

void end_phase_if_complete(Block& block, u32 address, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
  auto& waiting = machine.at_mbarriers;
  for (size_t i = 0; i < waiting.size();) {
    Fiber& fiber = *waiting[i];
    if (fiber.warp->block == &block && fiber.barrier == address && passed(barrier, fiber.parity)) {
      wake(fiber);
      waiting[i] = waiting.back();
      waiting.pop_back();
    } else {
      ++i;
    }
  }
}

void complete_bytes(Block& block, u32 address, unsigned bytes) {
  Mbarrier& barrier = find(block, address);
  barrier.bytes -= bytes;
  ++machine.events;
  end_phase_if_complete(block, address, barrier);
}

// The swizzle over 64 or 128 bytes: address bits 4 to 5 or 6 change by bits 7 to 8 or 9.
u32 swizzled(u32 address, u32 span) { return address ^ (address >> 3 & (span - 16)); }

unsigned rows_of(const Map& map) {
  unsigned rows = 1;
  for (unsigned dim = 1; dim < map.dims; ++dim) rows *= map.box[dim];
  return rows;
}

// Row `row` of a box, from element 0 of the tensor on; null: outside of the tensor.
const u8* row_of(const Copy& copy, unsigned row) {
  const Map& map = copy.map;
  const u8* from = reinterpret_cast<const u8*>(map.address);
  for (unsigned dim = 1; dim < map.dims; row /= map.box[dim], ++dim) {
    const std::int64_t x = copy.at[dim] + std::int64_t(row % map.box[dim]);
    if (x < 0 || u64(x) >= map.size[dim]) return nullptr;
    from += u64(x) * map.stride[dim - 1];
  }
  return from;
}

void check_reads(const Copy& copy) {
  if (copy.from) return check_read(copy.from, copy.bytes);
  const Map& map = copy.map;
  const std::int64_t first = std::max(copy.at[0], 0), last = std::min<std::int64_t>(copy.at[0] + map.box[0], map.size[0]);
  for (unsigned row = 0; row < rows_of(map) && first < last; ++row)
    if (const u8* const from = row_of(copy, row))
      check_read(from + first * map.element_bytes, u64(last - first) * map.element_bytes);
}

void store_box(Copy& copy) {
  const Map& map = copy.map;
  const unsigned row_bytes = map.box[0] * map.element_bytes, rows = rows_of(map);
  for (unsigned row = 0; row < rows; ++row) {
    const u8* const from = row_of(copy, row);
    u8 bytes[256 * 8] = {};
    for (unsigned i = 0; from && i < map.box[0]; ++i) {
      const std::int64_t x = copy.at[0] + std::int64_t(i);
      if (x >= 0 && u64(x) < map.size[0])
        std::memcpy(bytes + i * map.element_bytes, from + x * map.element_bytes, map.element_bytes);
    }
    for (unsigned i = 0; i < row_bytes; i += 16) {
      const u32 to = copy.to + row * row_bytes + i;
      std::memcpy(resolve_async(*copy.block, map.swizzle ? swizzled(to, map.swizzle) : to, 16, 16), bytes + i, 16);
    }
  }
}

void perform(Copy& copy) {
  if (copy.from) std::memcpy(resolve_async(*copy.block, copy.to, copy.bytes, 16), copy.from, copy.bytes);
  else store_box(copy);
  complete_bytes(*copy.block, copy.barrier, copy.bytes);
}

void issue(Copy copy, unsigned ranks) {
  check_reads(copy);
  Block& mine = this_block();
  Cluster& cluster = *mine.cluster;
  if (ranks == kThisBlock) ranks = 1u << mine.rank;
  if (ranks >> cluster.blocks.size()) fail("a copy to ranks %#x of a cluster of %zu", ranks, cluster.blocks.size());
  for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
    if (!(ranks >> rank & 1)) continue;
    copy.block = &cluster.blocks[rank];
    if (copy.block->live == 0) fail("a copy into the memory of a block that has ended");
    find(*copy.block, copy.barrier);
    u8* const to = resolve_async(*copy.block, copy.to, copy.bytes, 16);
    switch (machine.launch.asynchrony) {
      case Asynchrony::early: perform(copy); break;
      case Asynchrony::late: std::memset(to, 0xff, copy.bytes);  // nobody may count on what it held
      // fall through
      case Asynchrony::random: machine.copies.push_back(copy);
    }
  }
}

}  // namespace

void barrier_init(u32 address, unsigned arrivals) {
  if (arrivals == 0 || arrivals >= 1u << 20) fail("an mbarrier of %u arrivals", arrivals);
  Mbarrier barrier = {};
  barrier.pending = barrier.arrivals = arrivals;
  std::memcpy(shared(address, 8, 8), &barrier, 8);
}

void barrier_arrive(u32 address, unsigned rank, unsigned expected_bytes) {
  Block& mine = this_block();
  Cluster& cluster = *mine.cluster;
  if (rank == kThisBlock) rank = mine.rank;
  if (rank >= cluster.blocks.size()) fail("there is no block %u in a cluster of %zu", rank, cluster.blocks.size());
  Block& block = cluster.blocks[rank];
  if (block.live == 0) fail("an arrival at a barrier of a block that has ended");
  Mbarrier& barrier = find(block, address);
  if (barrier.pending == 0) fail("more than %u arrivals at mbarrier %#x in one phase", unsigned(barrier.arrivals), address);
  barrier.bytes += expected_bytes;
  --barrier.pending;
  ++machine.events;
  end_phase_if_complete(block, address, barrier);
  give_way();
}

bool barrier_passed(u32 address, unsigned parity) { return passed(find(this_block(), address), parity); }

void barrier_wait(u32 address, unsigned parity) {
  if (barrier_passed(address, parity)) return;
  Fiber& fiber = *machine.current;
  fiber.barrier = address, fiber.parity = parity;
  machine.at_mbarriers.push_back(&fiber);
  suspend(Wait::mbarrier);
}

void describe_mbarrier(Block& block, u32 address, char* text, unsigned size) {
  const auto& barrier = *reinterpret_cast<const Mbarrier*>(resolve(block, address, 8, 8));
  std::snprintf(text, size, "mbarrier %#x (dynamic + %#x), in phase %u: %u of %u arrivals and %d bytes missing", address,
                address - kShared, unsigned(barrier.phase), unsigned(barrier.pending), unsigned(barrier.arrivals),
                int(barrier.bytes));
}

void copy_tensor(u32 to, const void* map, u32 barrier, const int* at, unsigned dims, unsigned ranks) {
  Copy copy = {};
  std::memcpy(&copy.map, map, sizeof copy.map);
  if (copy.map.magic != kMapMagic) fail("not a tensor map");
  if (copy.map.dims != dims) fail("a copy of %u dims by a map of %u", dims, copy.map.dims);
  if (to % 128 != 0) fail("a tensor copy to %#x, not a multiple of 128", to);
  copy.to = to, copy.barrier = barrier;
  copy.bytes = copy.map.box[0] * copy.map.element_bytes * rows_of(copy.map);
  std::copy(at, at + dims, copy.at);
  issue(copy, ranks);
}

void copy_bulk(u32 to, const void* from, unsigned bytes, u32 barrier) {
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    fail("a bulk copy of %u bytes from %p: not multiples of 16", bytes, from);
  Copy copy = {};
  copy.from = static_cast<const u8*>(from);
  copy.to = to, copy.barrier = barrier, copy.bytes = bytes;
  issue(copy, kThisBlock);
}

void perform_some_copy() {
  auto& copies = machine.copies;
  if (copies.empty()) return;
  const unsigned at = choice(unsigned(copies.size()));
  Copy copy = copies[at];
  copies[at] = copies.back();
  copies.pop_back();
  perform(copy);
}

}  // namespace simt
