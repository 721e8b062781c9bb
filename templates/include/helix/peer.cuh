// Memory that other GPUs write into, and waiting for it. Apart from the rest, like convert.cuh, for the CPU's version.
#pragma once
#include "helix/element.cuh"

namespace helix {

HELIX_DEVICE void store_to_peer(u32* to, u32 word) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
HELIX_DEVICE void store_to_peer(Vector16* to, Vector16 v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.words[0]), "r"(v.words[1]),
               "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}

// A store that is seen, by the host too, only after all that this thread stored before.
HELIX_DEVICE void store_last(u32* to, u32 word) {
  asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

HELIX_DEVICE u32 load_from_inbox(const u32* from) {
  u32 word;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}
HELIX_DEVICE Vector16 load_from_inbox(const Vector16* from) {
  Vector16 v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from)
               : "memory");
  return v;
}

HELIX_DEVICE u64 nanoseconds() {
  u64 time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

}  // namespace helix
