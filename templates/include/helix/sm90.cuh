// What Hopper has and CUDA C++ without headers does not spell: mbarriers, the tensor copy engine, warpgroup fences,
// clusters, programmatic dependent launch. Shared memory is addressed by 32-bit addresses throughout.
#pragma once
#include "helix/operand.cuh"

namespace helix {

struct alignas(64) TensorMap { u64 opaque[16]; };  // CUtensorMap's ABI
static_assert(sizeof(TensorMap) == 128, "tensor map");

HELIX_DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// The dynamic shared memory of the launch.
HELIX_DEVICE u8* dynamic_shared() {
  extern __shared__ __align__(1024) u8 memory[];
  return memory;
}

HELIX_DEVICE bool elect_one() {
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

HELIX_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

HELIX_DEVICE void barrier_init_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Where memory is handed over that lanes read or wrote, each lane arrives: about as fast as one after __syncwarp, of
// which compute-sanitizer would take in only what the arriving lane did.
HELIX_DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and expect `bytes` of the copy engine before the phase can end.
HELIX_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrive on the barrier at the same address in block `rank` of the cluster. Orders no writes between the blocks (that
// would cost a fence of the whole GPU): for passing back memory that was only read.
HELIX_DEVICE void barrier_arrive_cluster(u32 barrier, u32 rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier), "r"(rank)
      : "memory");
}

// What this thread has seen and written comes before what threads of the cluster do after its next arrival.
HELIX_DEVICE void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

HELIX_DEVICE bool barrier_try(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Has the phase of this parity ended? Does not wait.
HELIX_DEVICE bool barrier_passed(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Polls before a wait gives up: a bug ends the kernel with an error and not the machine with a hang.
constexpr u32 kMostPolls = 1u << 22;

HELIX_DEVICE void barrier_wait(u32 barrier, u32 parity) {
  for (u32 polls = 0; !barrier_try(barrier, parity); ++polls)
    if (polls == kMostPolls) __trap();
}

// The same, of a barrier that is a variable.
HELIX_DEVICE void barrier_init(u64* barrier, u32 arrivals) { barrier_init(shared_address(barrier), arrivals); }
HELIX_DEVICE void barrier_arrive(u64* barrier) { barrier_arrive(shared_address(barrier)); }
HELIX_DEVICE void barrier_expect(u64* barrier, u32 bytes) { barrier_expect(shared_address(barrier), bytes); }
HELIX_DEVICE void barrier_wait(u64* barrier, u32 parity) { barrier_wait(shared_address(barrier), parity); }

// One barrier of `threads` threads of the block, by its number (0 is __syncthreads'); all lanes of a warp together.
HELIX_DEVICE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// The same; says whether `mine` holds for any of the threads.
HELIX_DEVICE bool named_barrier_any(int number, int threads, bool mine) {
  u32 any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %3, 0; barrier.cta.red.or.pred q, %1, %2, p; selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(number), "r"(threads), "r"(u32(mine))
      : "memory");
  return any != 0;
}

// The same as named_barrier, for warps whose lanes may come one by one.
template <int number, int threads> HELIX_DEVICE void named_barrier_diverged() {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(number), "n"(threads) : "memory");
}

// Ordinary stores to shared memory become visible to wgmma and the copy engine.
HELIX_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

HELIX_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// L2 policies for data read once and data read by many blocks.
constexpr u64 kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

HELIX_DEVICE void copy_4d(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3),
      "l"(policy)
      : "memory");
}

// A 4D box to a variable in shared memory; read once, so L2 may drop it first.
HELIX_DEVICE void copy_box(void* to, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
  copy_4d(shared_address(to), map, shared_address(barrier), x, y, z, w, kEvictFirst);
}

// To the same address in every block of the cluster that is in `ranks`, each block's own barrier counting its bytes.
HELIX_DEVICE void copy_4d_multicast(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3,
                                    u64 policy, u16 ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1),
      "r"(x2), "r"(x3), "h"(ranks), "l"(policy)
      : "memory");
}

// A 4D box to a variable in the shared memory of both blocks of a cluster.
HELIX_DEVICE void copy_box_to_both(void* to, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
  copy_4d_multicast(shared_address(to), map, shared_address(barrier), x, y, z, w, kEvictFirst, 3);
}

HELIX_DEVICE void copy_5d(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, int x4,
                          u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2),
      "r"(x3), "r"(x4), "l"(policy)
      : "memory");
}

// `bytes` bytes, a multiple of 16, from global to shared memory, both at multiples of 16.
HELIX_DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// x, of which the compiler knows nothing: keeps it from computing ahead of a loop, and holding, what x leads to.
HELIX_DEVICE u32 opaque(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

HELIX_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HELIX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> HELIX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kRegisters> HELIX_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> HELIX_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

HELIX_DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster; orders no writes but those before barrier_init_visible.
HELIX_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// Programmatic dependent launch: the next kernel may start; the previous one has finished and its writes are visible.
HELIX_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
HELIX_DEVICE void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

HELIX_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HELIX_DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HELIX_DEVICE u32 pack_bfloat16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

HELIX_DEVICE void store_shared(u32 address, u32 word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
HELIX_DEVICE void store_shared(u32 address, float x) { store_shared(address, u32(__float_as_int(x))); }
HELIX_DEVICE void store_shared(u32 address, Vector16 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.words[0]), "r"(v.words[1]),
               "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}
HELIX_DEVICE Vector16 load_global(const void* from) {
  Vector16 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from));
  return v;
}
// Of what no kernel writes and this one reads once.
HELIX_DEVICE Vector16 load_streamed(const void* from) {
  Vector16 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from));
  return v;
}
// Asks for the line at `from` to be in the L2 soon.
HELIX_DEVICE void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
HELIX_DEVICE void store_global(void* to, Vector16 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]),
               "r"(v.words[3])
               : "memory");
}
HELIX_DEVICE float load_shared(u32 address) {
  u32 word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return __int_as_float(int(word));
}
HELIX_DEVICE u32 load_shared_byte(u32 address) {
  u32 byte;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address) : "memory");
  return byte;
}
HELIX_DEVICE Vector16 load_shared_vector(u32 address) {
  Vector16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "r"(address)
               : "memory");
  return v;
}

// Global memory that other thread blocks read and write at the same time: whole words, in no order.
HELIX_DEVICE void store_relaxed(float* to, const float4& x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], { %1, %2, %3, %4 };" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
HELIX_DEVICE void store_relaxed(float* to, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}
HELIX_DEVICE void load_relaxed(u32 (&x)[4], const float* from) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 { %0, %1, %2, %3 }, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(from)
               : "memory");
}
HELIX_DEVICE void load_relaxed(u32& x, const float* from) {
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
}

}  // namespace helix
