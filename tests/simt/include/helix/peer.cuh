// templates/include/helix/peer.cuh for a CPU: the other GPUs are threads of this process.
#pragma once
#include <chrono>
#include <random>
#include <thread>

#include "helix/element.cuh"

namespace helix {

inline void store_to_peer(u32* to, u32 word) { __atomic_store_n(to, word, __ATOMIC_RELEASE); }
inline void store_to_peer(Vector16* to, Vector16 v) {
  for (int i : {2, 0, 3, 1}) store_to_peer(&to->words[i], v.words[i]);  // in no order to rely on
}

inline void store_last(u32* to, u32 word) { __atomic_store_n(to, word, __ATOMIC_RELEASE); }

// A slow GPU sleeps `slow_times` times, before one read in `slow_one_in`: what a peer overwrites meanwhile is lost.
extern "C" {
unsigned slow_times = 0, slow_one_in = 1, slow_microseconds = 0;
}
inline void dawdle() {
  simt::wait_outside();
  static std::minstd_rand random(std::random_device{}());
  if (slow_times > 0 && random() % slow_one_in == 0) {
    --slow_times;
    std::this_thread::sleep_for(std::chrono::microseconds(slow_microseconds));
  }
}

inline u32 load_from_inbox(const u32* from) {
  dawdle();
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}
inline Vector16 load_from_inbox(const Vector16* from) {
  dawdle();
  Vector16 v;
  for (int i : {1, 3, 0, 2}) v.words[i] = __atomic_load_n(&from->words[i], __ATOMIC_ACQUIRE);
  return v;
}

inline u64 nanoseconds() {
  return u64(std::chrono::duration_cast<std::chrono::nanoseconds>(
                 std::chrono::steady_clock::now().time_since_epoch())
                 .count());
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }


}  // namespace helix
