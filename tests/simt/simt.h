// A GPU on one CPU core, as much of it as kernels need: what the CUDA language (cuda_on_cpu.h) and the instructions
// (include/helix/) are written with. A fiber is a thread. Blocks on the GPU at once run interleaved, warp by warp, in an
// order drawn from a seed; what a kernel may not rely on (the order of warps, when the copy engine and the tensor cores
// do their work, what fresh shared memory holds) is chosen against it.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

namespace simt {

struct Index { unsigned x, y, z; };
extern thread_local Index thread_index, block_index, block_size, grid_size;

// When asynchronous work is done: at once; not before somebody has to wait for it; or by chance in between.
enum class Asynchrony : unsigned { early, late, random };

// Mirrored in cpu_kernel.py.
struct Launch {
  Index grid;
  unsigned threads, shared, cluster;  // a block's threads and bytes of dynamic shared memory, a cluster's blocks
  unsigned resident;                  // blocks on the GPU at once
  unsigned early;                     // a programmatic dependent launch
  Asynchrony asynchrony;
  std::uint64_t seed;
};

// Runs all blocks; returns null, or what went wrong. `variable`: any thread_local of the kernel's library, which has to
// have been touched; `call` is in that library, too.
const char* run(const Launch& launch, const void* variable, void (*call)(void** values), void** values);

// Ends the launch with a message, from within a thread of it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- One warp -------------------------------------------------------------------------------------------------------

// What each lane of the warp brought to a meeting; `present` has a bit for each lane that came.
struct Lanes {
  void* brought[32];
  unsigned present;
  template <class T> T& at(unsigned lane) const { return *static_cast<T*>(brought[lane]); }
  bool has(unsigned lane) const { return present >> lane & 1; }
};

// Waits for the lanes of `mask` that have not ended. All have to come to the same `what`; the last one calls `complete`.
void meet(const char* what, unsigned mask, void* mine, void (*complete)(const Lanes&));

unsigned lane();

// ---- A block and its cluster ----------------------------------------------------------------------------------------

constexpr unsigned kAllThreads = 0;
void block_barrier(unsigned number, unsigned threads);
bool block_barrier_any(unsigned number, unsigned threads, bool mine);
void cluster_barrier();
unsigned cluster_rank();
// Lets others run: in a loop that waits for another thread's write.
void spin();
// The same, in a loop that waits for another GPU, which is another thread of this process.
void wait_outside();
// After what others may react to: by chance, lets them do so for as long as they can.
void give_way();
// Programmatic dependent launch (overlap.cpp).
void wait_for_previous_kernels();
void let_next_kernel_start();
// A number below `bound`, of this launch and by its seed.
unsigned choice(unsigned bound);

// ---- Shared memory, by 32-bit addresses -----------------------------------------------------------------------------

unsigned char* dynamic_shared();
std::uint32_t shared_address(const void* p);
// The memory at `address` of this block. Fails unless `bytes` from there on belong to it, and it is aligned to `align`.
void* shared(std::uint32_t address, unsigned bytes, unsigned align);
// The same, to be written by an ordinary store: the tensor cores and the copy engine may not touch it before this thread
// has called fence_async_proxy.
void* shared_for_store(std::uint32_t address, unsigned bytes, unsigned align);
void fence_async_proxy();

// ---- mbarriers and the copy engine ----------------------------------------------------------------------------------

void barrier_init(std::uint32_t barrier, unsigned arrivals);
void barrier_arrive(std::uint32_t barrier, unsigned rank, unsigned expected_bytes);
bool barrier_passed(std::uint32_t barrier, unsigned parity);
void barrier_wait(std::uint32_t barrier, unsigned parity);

constexpr unsigned kThisBlock = ~0u;  // in place of a mask of ranks

// A tensor map as cpu_kernel.py writes it.
struct Map {
  std::uint64_t magic, address;
  std::uint32_t dims, element_bytes, swizzle, box[5];
  std::uint32_t unused[2];
  std::uint64_t size[5], stride[4];
};
static_assert(sizeof(Map) == 128, "as large as the driver's");
constexpr std::uint64_t kMapMagic = 0x70616d20746d6973;

void copy_tensor(std::uint32_t to, const void* map, std::uint32_t barrier, const int* at, unsigned dims,
                 unsigned ranks);
void copy_bulk(std::uint32_t to, const void* from, unsigned bytes, std::uint32_t barrier);

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

enum class Element : unsigned { bfloat16, float16, e4m3 };

// d[64][columns] += a[64][k] b[k][columns] of one warpgroup; k is 16 of 16-bit elements or 32 of e4m3.
struct Product {
  float* d;
  unsigned columns;
  Element element;
  bool accumulate, a_transposed, b_transposed;
  const std::uint32_t* a_registers;  // null: a is a descriptor
  std::uint64_t a, b;                // descriptors
};
void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending);

float to_float(Element element, unsigned bits);

// ---- The call of a kernel -------------------------------------------------------------------------------------------

template <class... A, std::size_t... I>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(values[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** values) {
  call(kernel, values, std::index_sequence_for<A...>{});
}

}  // namespace simt
