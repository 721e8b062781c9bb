// Chunk: consecutive elements in one thread's registers, moved by one load or store (16 bytes at most, else several).
#pragma once
#include "helix/element.cuh"

namespace helix {

template <class T, int n> struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Chunk {
  static constexpr int kWords = n * sizeof(T) / sizeof(u32);
  T items[n];

  HELIX_DEVICE void load(const T* from) { *this = *reinterpret_cast<const Chunk*>(from); }

  // Before all that uses what was loaded, however many registers that takes.
  HELIX_DEVICE void load_early(const T* from) {
    if constexpr (kWords == 0) {
      load(from);
    } else {
      u32 words[kWords];
      load_words<kWords>(words, reinterpret_cast<const u32*>(from));
#pragma unroll
      for (int i = 0; i < n; ++i)
        from_bits(items[i], words[i * sizeof(T) / sizeof(u32)] >> 8 * (i * sizeof(T) % sizeof(u32)));
    }
  }

  // Not by assignment: that becomes one store an element where the elements were computed one by one.
  HELIX_DEVICE void store(T* to) const {
    if constexpr (kWords == 0) {
      *reinterpret_cast<Chunk*>(to) = *this;
    } else {
      u32 words[kWords] = {};
#pragma unroll
      for (int i = 0; i < n; ++i)
        words[i * sizeof(T) / sizeof(u32)] |= bits_of(items[i]) << 8 * (i * sizeof(T) % sizeof(u32));
      store_words<kWords>(reinterpret_cast<u32*>(to), words);
    }
  }
};

template <class To, class From, int n> HELIX_DEVICE Chunk<To, n> converted(const Chunk<From, n>& chunk) {
  if constexpr (kSame<To, From>) {
    return chunk;
  } else {
    Chunk<To, n> out;
#pragma unroll
    for (int i = 0; i < n; ++i) out.items[i] = from_float<To>(to_float(chunk.items[i]));
    return out;
  }
}

}  // namespace helix
