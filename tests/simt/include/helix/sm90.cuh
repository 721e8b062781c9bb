// The instructions of templates/include/helix/sm90.cuh for a CPU (see simt.h).
#pragma once
#include "helix/operand.cuh"

namespace helix {

struct alignas(64) TensorMap { u64 opaque[16]; };

HELIX_DEVICE u8* dynamic_shared() { return simt::dynamic_shared(); }
HELIX_DEVICE u32 shared_address(const void* p) { return simt::shared_address(p); }

// Any lane may be the one.
HELIX_DEVICE bool elect_one() {
  bool elected = false;
  simt::meet("elect.sync", 0xffffffffu, &elected, [](const simt::Lanes& lanes) {
    unsigned lane = simt::choice(32);
    while (!lanes.has(lane)) lane = (lane + 1) % 32;
    lanes.at<bool>(lane) = true;
  });
  return elected;
}

constexpr u32 kMostPolls = 1u << 22;

HELIX_DEVICE void barrier_init(u32 barrier, u32 arrivals) { simt::barrier_init(barrier, arrivals); }
HELIX_DEVICE void barrier_init_visible() {}
HELIX_DEVICE void barrier_arrive(u32 barrier) { simt::barrier_arrive(barrier, simt::kThisBlock, 0); }
HELIX_DEVICE void barrier_expect(u32 barrier, u32 bytes) { simt::barrier_arrive(barrier, simt::kThisBlock, bytes); }
HELIX_DEVICE void barrier_arrive_cluster(u32 barrier, u32 rank) { simt::barrier_arrive(barrier, rank, 0); }
HELIX_DEVICE bool barrier_try(u32 barrier, u32 parity) {
  if (!simt::barrier_passed(barrier, parity)) simt::spin();
  return simt::barrier_passed(barrier, parity);
}
HELIX_DEVICE bool barrier_passed(u32 barrier, u32 parity) { return simt::barrier_passed(barrier, parity); }
HELIX_DEVICE void barrier_wait(u32 barrier, u32 parity) { simt::barrier_wait(barrier, parity); }
HELIX_DEVICE void barrier_init(u64* barrier, u32 arrivals) { barrier_init(shared_address(barrier), arrivals); }
HELIX_DEVICE void barrier_arrive(u64* barrier) { barrier_arrive(shared_address(barrier)); }
HELIX_DEVICE void barrier_expect(u64* barrier, u32 bytes) { barrier_expect(shared_address(barrier), bytes); }
HELIX_DEVICE void barrier_wait(u64* barrier, u32 parity) { barrier_wait(shared_address(barrier), parity); }

HELIX_DEVICE void named_barrier(int number, int threads) { simt::block_barrier(unsigned(number), unsigned(threads)); }
HELIX_DEVICE bool named_barrier_any(int number, int threads, bool mine) {
  return simt::block_barrier_any(unsigned(number), unsigned(threads), mine);
}
template <int number, int threads> HELIX_DEVICE void named_barrier_diverged() { named_barrier(number, threads); }

HELIX_DEVICE void fence_async_proxy() { simt::fence_async_proxy(); }
HELIX_DEVICE void prefetch_map(const TensorMap*) {}

constexpr u64 kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

HELIX_DEVICE void copy_4d(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, u64) {
  const int at[] = {x0, x1, x2, x3};
  simt::copy_tensor(to, map, barrier, at, 4, simt::kThisBlock);
}
HELIX_DEVICE void copy_box(void* to, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
  copy_4d(shared_address(to), map, shared_address(barrier), x, y, z, w, kEvictFirst);
}
HELIX_DEVICE void copy_4d_multicast(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, u64,
                                    u16 ranks) {
  const int at[] = {x0, x1, x2, x3};
  simt::copy_tensor(to, map, barrier, at, 4, ranks);
}
HELIX_DEVICE void copy_5d(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, int x4, u64) {
  const int at[] = {x0, x1, x2, x3, x4};
  simt::copy_tensor(to, map, barrier, at, 5, simt::kThisBlock);
}
HELIX_DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  simt::copy_bulk(to, from, bytes, barrier);
}

HELIX_DEVICE void copy_box_to_both(void* to, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
  copy_4d_multicast(shared_address(to), map, shared_address(barrier), x, y, z, w, kEvictFirst, 3);
}

HELIX_DEVICE u32 opaque(u32 x) { return x; }

HELIX_DEVICE void wgmma_begin() { simt::wgmma_fence(); }
HELIX_DEVICE void wgmma_commit() { simt::wgmma_commit(); }
template <int kPending> HELIX_DEVICE void wgmma_wait() { simt::wgmma_wait(kPending); }

template <int kRegisters> HELIX_DEVICE void registers_grow() {}
template <int kRegisters> HELIX_DEVICE void registers_shrink() {}

HELIX_DEVICE u32 cluster_rank() { return simt::cluster_rank(); }
HELIX_DEVICE void fence_cluster() {}
HELIX_DEVICE void cluster_barrier() { simt::cluster_barrier(); }

HELIX_DEVICE void let_next_kernel_start() { simt::let_next_kernel_start(); }
HELIX_DEVICE void wait_for_previous_kernels() { simt::wait_for_previous_kernels(); }

HELIX_DEVICE float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // .ftz
}
HELIX_DEVICE float log2_approximate(float x) { return std::log2(x); }

HELIX_DEVICE u32 pack_bfloat16(float low, float high) {
  return float_to_bfloat16_bits(low) | u32(float_to_bfloat16_bits(high)) << 16;
}

HELIX_DEVICE void store_shared(u32 address, u32 word) { std::memcpy(simt::shared_for_store(address, 4, 4), &word, 4); }
HELIX_DEVICE void store_shared(u32 address, float x) { std::memcpy(simt::shared_for_store(address, 4, 4), &x, 4); }
HELIX_DEVICE void store_shared(u32 address, Vector16 v) { std::memcpy(simt::shared_for_store(address, 16, 16), &v, 16); }
HELIX_DEVICE float load_shared(u32 address) {
  float x;
  std::memcpy(&x, simt::shared(address, 4, 4), 4);
  return x;
}
HELIX_DEVICE u32 load_shared_byte(u32 address) { return *static_cast<const u8*>(simt::shared(address, 1, 1)); }
HELIX_DEVICE Vector16 load_shared_vector(u32 address) {
  Vector16 v;
  std::memcpy(&v, simt::shared(address, 16, 16), 16);
  return v;
}

template <class T> HELIX_DEVICE T* aligned(T* p, u32 bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) simt::fail("%p is not a multiple of %u", p, bytes);
  return p;
}
HELIX_DEVICE Vector16 load_global(const void* from) {
  Vector16 v;
  std::memcpy(&v, aligned(from, 16), 16);
  return v;
}
HELIX_DEVICE Vector16 load_streamed(const void* from) { return load_global(from); }
// Nothing is seen of it but a fault where there is no memory.
__attribute__((no_sanitize_thread)) HELIX_DEVICE void prefetch_line(const void* from) { *static_cast<const volatile u8*>(from); }
HELIX_DEVICE void store_global(void* to, Vector16 v) { std::memcpy(aligned(to, 16), &v, 16); }

// Others may run between any two of these: a loop of loads sees what they wrote in the meantime.
HELIX_DEVICE void store_relaxed(float* to, const float4& x) {
  std::memcpy(aligned(to, 16), &x, 16);
  simt::give_way();
}
HELIX_DEVICE void store_relaxed(float* to, float x) {
  *to = x;
  simt::give_way();
}
HELIX_DEVICE void load_relaxed(u32 (&x)[4], const float* from) {
  simt::spin();
  std::memcpy(x, aligned(from, 16), 16);
}
HELIX_DEVICE void load_relaxed(u32& x, const float* from) {
  simt::spin();
  std::memcpy(&x, from, 4);
}

}  // namespace helix
