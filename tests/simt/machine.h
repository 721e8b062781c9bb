// The state of the GPU that machine.cpp, copy_engine.cpp and tensor_cores.cpp share.
#pragma once
#include <setjmp.h>

#include <array>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {

using u8 = unsigned char;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

struct Block;
struct Warp;
struct Cluster;

constexpr unsigned kStackBytes = 128 << 10;

enum class Wait { nothing, warp, block, cluster, mbarrier, spin, done };

struct Fiber {
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();
  jmp_buf context;
  u8* stack = nullptr;  // those of a warp lie together
  bool started = false;
  Warp* warp;
  unsigned thread;
  Wait wait = Wait::done;
  // What it waits for.
  const char* what;
  unsigned mask;
  void* brought;
  void (*complete)(const Lanes&);
  unsigned number;
  u32 barrier, parity;
  std::vector<u32> unfenced;  // words of the block's dynamic shared memory that it stored since its last proxy fence
  bool waited;  // for the kernels before
};

// The sums of one warp's 16 rows of a product that is under way: the registers hold nothing until it is complete.
struct Accumulator {
  float* registers[32];
  unsigned columns, products;
  float sums[16][256];
};

struct PendingProduct {
  Product product;
  u32 a[32][4];
  Accumulator* sums;
  unsigned group;
};

struct Warp {
  Block* block;
  Fiber* fibers;
  unsigned first, live, ready, meeting;  // first thread; masks of lanes
  bool queued;
  std::deque<PendingProduct> products;
  std::vector<std::unique_ptr<Accumulator>> sums;
  unsigned groups;  // committed, since the block began
  bool fenced;
};

struct NamedBarrier {
  unsigned expected, arrived;
  bool any, verdict;  // of those who have arrived; of the last phase
};

struct Block {
  Cluster* cluster;
  Index index;
  unsigned rank, live;
  u8* memory;               // dynamic shared memory
  std::vector<unsigned short> unfenced;  // by word of it: 0, or 1 + the thread in whose list it is
  std::vector<u8> statics;  // its __shared__ variables, while another block runs
  std::deque<Warp> warps;
  NamedBarrier named[16];
  bool waited, triggered_early;  // some thread has waited, let the next kernel start before it waited
};

struct Cluster {
  std::deque<Block> blocks;
  unsigned live, at_barrier;  // threads
  bool running;
};

struct Copy {
  Block* block;
  u32 to, barrier, bytes;
  const u8* from;  // null: a box of the map
  Map map;
  int at[5];
};

// Launches that overlap (overlap.cpp).
struct History {
  bool on = false;
  u32 launch = 1, settled = 0;            // this one; the last that had ended when this one began
  bool waited = false, orderly = true;    // of this one: a thread has waited; a block has, before it let the next start
  std::unordered_map<u64, std::array<u32, 4096>> pages;  // by byte: the last launch that stored to it
};

struct Machine {
  Launch launch;
  History history;
  void (*call)(void**);
  void** values;
  jmp_buf scheduler, failed;
  Fiber* current;
  std::vector<std::unique_ptr<Cluster>> clusters;  // on the GPU
  std::vector<std::unique_ptr<Fiber[]>> fibers;   // by warp; kept between launches
  std::vector<Warp*> runnable, asleep;  // asleep: could run, but not before nobody else can
  bool doze;                             // the warp that runs falls asleep when its other lanes have had their turn
  std::vector<Fiber*> at_mbarriers, spinning;
  std::vector<Copy> copies;
  Block* loaded;             // whose __shared__ variables are in place
  u8* variables;             // that place
  unsigned variable_bytes;
  u64 random, events;        // events: whatever a spinning thread may wait for
};
extern thread_local Machine machine;  // a GPU for each thread of the process

// Shared memory: dynamic at kShared, variables after it. The hardware keeps the first KiB for itself, too.
constexpr u32 kShared = 1024;
inline u32 variables_begin() { return kShared + (machine.launch.shared + 1023) / 1024 * 1024; }
u8* resolve(Block& block, u32 address, unsigned bytes, unsigned align);
// The same, for the tensor cores and the copy engine.
u8* resolve_async(Block& block, u32 address, unsigned bytes, unsigned align);

inline Block& this_block() { return *machine.current->warp->block; }
void wake(Fiber& fiber);
void suspend(Wait wait);
bool chance(unsigned one_in);

void block_ended(const Block& block);
void begin_launch(bool early);
void check_read(const void* from, u64 bytes);
extern thread_local Fiber* watched;  // whose loads and stores are looked at

void describe_mbarrier(Block& block, u32 barrier, char* text, unsigned size);
void perform_some_copy();
void perform_some_product();
void clear_products(Warp& warp);

}  // namespace simt
