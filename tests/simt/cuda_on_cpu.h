// What CUDA C++ has built in, for a CPU (see simt.h). Included before a kernel's own source.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ thread_local  // lie together: each block gets its own (machine.cpp)

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(M_PI * x)), *cosine = float(std::cos(M_PI * x));
}

inline void __syncthreads() { simt::block_barrier(0, simt::kAllThreads); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::meet("__syncwarp", mask, nullptr, [](const simt::Lanes&) {});
}
[[noreturn]] inline void __trap() { simt::fail("__trap"); }

namespace simt {

struct Shuffle { unsigned bits, from, result; };

template <class T> T shuffle(const char* what, unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) == 4, "one word");
  Shuffle mine = {0, from, 0};
  std::memcpy(&mine.bits, &value, 4);
  meet(what, mask, &mine, [](const Lanes& lanes) {
    for (unsigned i = 0; i < 32; ++i) {
      if (!lanes.has(i)) continue;
      Shuffle& to = lanes.at<Shuffle>(i);
      if (!lanes.has(to.from)) fail("a shuffle reads lane %u, which does not take part", to.from);
      to.result = lanes.at<Shuffle>(to.from).bits;
    }
  });
  std::memcpy(&value, &mine.result, 4);
  return value;
}

struct Vote { unsigned mine, result; };

inline unsigned ballot(const char* what, unsigned mask, bool x) {
  Vote vote = {x, 0};
  meet(what, mask, &vote, [](const Lanes& lanes) {
    unsigned all = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes.has(i)) all |= lanes.at<Vote>(i).mine << i;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes.has(i)) lanes.at<Vote>(i).result = all;
  });
  return vote.result;
}

}  // namespace simt

template <class T> T __shfl_sync(unsigned mask, T x, int from) {
  return simt::shuffle("__shfl_sync", mask, x, unsigned(from) % 32);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return simt::shuffle("__shfl_xor_sync", mask, x, (simt::lane() ^ unsigned(bits)) % 32);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned distance) {
  const unsigned lane = simt::lane();
  return simt::shuffle("__shfl_up_sync", mask, x, lane < distance ? lane : lane - distance);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned distance) {
  const unsigned lane = simt::lane();
  return simt::shuffle("__shfl_down_sync", mask, x, lane + distance > 31 ? lane : lane + distance);
}
inline unsigned __ballot_sync(unsigned mask, bool x) { return simt::ballot("__ballot_sync", mask, x); }
inline int __any_sync(unsigned mask, bool x) { return simt::ballot("__any_sync", mask, x) != 0; }
inline int __all_sync(unsigned mask, bool x) { return simt::ballot("__all_sync", mask, !x) == 0; }
// Of unsigned integers.
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  struct Largest { unsigned mine, result; } largest = {x, 0};
  simt::meet("__reduce_max_sync", mask, &largest, [](const simt::Lanes& lanes) {
    unsigned all = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes.has(i)) all = std::max(all, lanes.at<Largest>(i).mine);
    for (unsigned i = 0; i < 32; ++i)
      if (lanes.has(i)) lanes.at<Largest>(i).result = all;
  });
  return largest.result;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) { return ~__reduce_max_sync(mask, ~x); }
inline int __reduce_add_sync(unsigned mask, int x) {
  struct Sum { int mine, result; } sum = {x, 0};
  simt::meet("__reduce_add_sync", mask, &sum, [](const simt::Lanes& lanes) {
    int all = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes.has(i)) all += lanes.at<Sum>(i).mine;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes.has(i)) lanes.at<Sum>(i).result = all;
  });
  return sum.result;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }

using std::max;
using std::min;
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
