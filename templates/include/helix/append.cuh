// Append: rotate query and key of one new token a row, and store the key and value in the paged KV cache.
//
//   q [B, H, D], k and v [B, KH, D]  ->  q_out [B, H, D] and, where owned[b], one token of the cache
//   MLA: cache k [pages, block, D], no v.  GQA: cache k, v [pages, KH, block, D].
//
// One warp a vector: first all B*H queries, then all B*KH keys (each with its value). Rows whose rank is not the owner
// still get their query rotated; they skip the write, and only the write. Shared memory: none.
// Roofline: memory, B * (2*H + 4*KH) * D elements moved, no reuse.
#pragma once
#include "helix/warp.cuh"

namespace helix {

// The new token's place: C::block tokens a page, C::kv_heads heads a page, D elements a token.
template <class C> HELIX_DEVICE i64 cache_offset(i64 slot, int kv_head) {
  const i64 page = slot / C::block, token = slot % C::block;
  return ((page * C::kv_heads + kv_head) * C::block + token) * C::head_dim;
}

// Copies `from` to `to`, the last rope_dim dims rotated. cos, sin: one a pair.
template <class C, class To, class From>
HELIX_DEVICE void rotate(To* to, const From* from, const float* cos, const float* sin, int lane) {
  constexpr int plain = C::head_dim - C::rope_dim, pairs = C::rope_dim / 2;
  for (int i = lane; i < plain; i += kWarp) to[i] = convert<To>(from[i]);
  for (int i = lane; i < pairs; i += kWarp) {
    const int first = plain + (C::interleaved ? 2 * i : i);
    const int second = plain + (C::interleaved ? 2 * i + 1 : i + pairs);
    const float x = to_float(from[first]), y = to_float(from[second]);
    to[first] = from_float<To>(x * cos[i] - y * sin[i]);
    to[second] = from_float<To>(y * cos[i] + x * sin[i]);
  }
}

template <class C>
HELIX_DEVICE void append(typename C::Element* q_out, const typename C::Element* q, const typename C::Element* k,
                         const typename C::Element* v, typename C::Cached* cache_k, typename C::Cached* cache_v,
                         const float* cos, const float* sin, const u8* owned, const i64* slots, int rows) {
  const int lane = threadIdx.x % kWarp;
  const i64 vector = i64(blockIdx.x) * (C::threads / kWarp) + threadIdx.x / kWarp;
  const i64 queries = i64(rows) * C::heads, keys = i64(rows) * C::kv_heads;
  if (vector < queries) {
    const i64 angle = vector / C::heads * (C::rope_dim / 2);
    rotate<C>(q_out + vector * C::head_dim, q + vector * C::head_dim, cos + angle, sin + angle, lane);
  } else if (vector < queries + keys) {
    const i64 row = (vector - queries) / C::kv_heads;
    const int kv_head = int((vector - queries) % C::kv_heads);
    if (!owned[row]) return;
    const i64 source = (vector - queries) * C::head_dim, target = cache_offset<C>(slots[row], kv_head);
    const i64 angle = row * (C::rope_dim / 2);
    rotate<C>(cache_k + target, k + source, cos + angle, sin + angle, lane);
    if constexpr (!C::mla)
      for (int i = lane; i < C::head_dim; i += kWarp) cache_v[target + i] = convert<typename C::Cached>(v[source + i]);
  }
}

}  // namespace helix
