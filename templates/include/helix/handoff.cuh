// Handoff: the KV of a prompt, as its prefill left it, into the pages of the generation rank that owns it, wherever they
// lie: the rank's own memory or, over NVLink, that of another GPU of the host. One pass, no copy in between.
//
//   each layer's kv: MLA [L, D], GQA [2, KH, L, D] (strided) -> pools [pages, heads of the target, block, D]
//   FP8: elements, and a byte for each vector, scales [pages, heads, block] (quantize.cuh).
//
// The token at local slot i of cp rank r is global position (i / block * cp + r) * block + i % block, and lies in page
// i / block of the list. C::lanes lanes hold one vector, a head of a token, in registers; blockIdx.y is a layer's K or V.
// Nothing here says that all is written: the end of the launch does, for whom the sender tells.
// Shared memory: none. Roofline: NVLink, the bytes of the cache; on one GPU memory, those and the KV as computed.
#pragma once
#include "helix/quantize.cuh"
#include "helix/warp.cuh"

namespace helix {

template <class C> struct HandoffArguments {
  const i64* sources;  // [layers and K or V] addresses of C::Element: the first head that is sent, position 0
  const i64* pools;    // [layers and K or V] addresses of C::Cached: the target's first page and head
  const i64* scales;   // the same of bytes; none unless FP8
  const int* pages;    // of the prompt on the target, in order
  int tokens, heads;   // that are sent
  int first_head, pool_heads;  // at the target
  int cp, cp_rank;
  i64 head_stride, token_stride;  // of a source, in elements
};

template <class C> HELIX_DEVICE void handoff(const HandoffArguments<C>& a) {
  using Element = typename C::Element;
  using Cached = typename C::Cached;
  constexpr int kStride = C::lanes * C::columns, kChunks = (C::head_dim + kStride - 1) / kStride;
  const i64 index = (i64(blockIdx.x) * C::threads + threadIdx.x) / C::lanes;
  const int lane = int(threadIdx.x) % C::lanes, head = int(index / a.tokens), token = int(index % a.tokens);
  const bool active = head < a.heads;
  const int page = token / C::block, offset = token % C::block;
  const i64 position = (i64(page) * a.cp + a.cp_rank) * C::block + offset;
  const Element* from =
      reinterpret_cast<const Element*>(a.sources[blockIdx.y]) + head * a.head_stride + position * a.token_stride;
  Chunk<Element, C::columns> chunks[kChunks] = {};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = i * kStride + lane * C::columns;
    if (active && at < C::head_dim) chunks[i].load(from + at);
  }
  const i64 slot =
      active ? (i64(a.pages[page]) * a.pool_heads + a.first_head + head) * C::block + offset : 0;
  Cached* to = reinterpret_cast<Cached*>(a.pools[blockIdx.y]) + slot * C::head_dim;
  u8 scale = 0;
  if constexpr (kSame<Cached, float8_e4m3fn>) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) largest = max_bits(largest, chunks[i]);
    scale = scale_of(warp_max_bits<C::lanes>(largest));
    if (active && lane == 0) reinterpret_cast<u8*>(a.scales[blockIdx.y])[slot] = scale;
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = i * kStride + lane * C::columns;
    if (active && at < C::head_dim) {
      if constexpr (kSame<Cached, float8_e4m3fn>)
        quantized(chunks[i], scale).store(to + at);
      else
        converted<Cached>(chunks[i]).store(to + at);
    }
  }
}

}  // namespace helix
