// Append: from the projections of new tokens to their attention: RMSNorm, RoPE, the query, and the cache's new tokens.
//
//   q_plain [N, H, D - R], q_rotary [N, H, R], k and v [N, KH, D], cos and sin [N, R / 2]  ->
//   q_out [N, H, D] and, where owned[n], one token of the cache
//   MLA: k is the latent, whose D - R columns are normed, and the rotary key; no v. Cache k [pages, block, D].
//   GQA: q and k may each have a norm over their D columns. Cache k, v [pages, KH, block, D].
//   FP8: elements, and a byte for each vector, scales [pages, (KH,) block] (quantize.cuh).
//
// C::lanes lanes hold one vector (one head of one token) in registers, in chunks of C::columns columns: a chunk is one
// load and one store, of 16 bytes where the dims allow, and both elements of a rotated pair lie with one lane. Values
// are rounded to Element wherever the published models round. A warp has one kind of vectors; keys, which take longest,
// come first. Tokens that are not owned skip the write, and only the write. Shared memory: none.
// Roofline: memory, N * (2 * H + KV * KH) * D elements moved, KV = 2 for MLA and 4 for GQA, no reuse.
#pragma once
#include "helix/quantize.cuh"
#include "helix/sm90.cuh"
#include "helix/warp.cuh"

namespace helix {

template <class C> struct AppendArguments {
  using Element = typename C::Element;
  using Cached = typename C::Cached;
  Element* q_out;
  const Element *q_plain, *q_rotary, *k, *v, *q_norm, *k_norm;
  Cached *cache_k, *cache_v;
  u8 *k_scale, *v_scale;
  const float *cos, *sin;
  const u8* owned;
  const i64* slots;
  int rows;  // N
  int q_plain_row, q_plain_head, q_rotary_row, q_rotary_head, k_row, k_head, v_row, v_head;  // strides in elements
};

// How lanes share a vector: first the plain columns, then the rotary ones, interleaved pairs in one run of columns,
// others in two.
template <class C> struct Layout {
  static constexpr int kStride = C::lanes * C::columns;
  static constexpr int kPlain = C::head_dim - C::rope_dim;
  static constexpr int kPlainChunks = (kPlain + kStride - 1) / kStride;
  static constexpr int kRuns = C::interleaved ? 1 : 2, kRun = C::rope_dim / kRuns;
  static constexpr int kRunChunks = (kRun + kStride - 1) / kStride;
  static constexpr int kChunks = kPlainChunks + kRuns * kRunChunks;
  static constexpr int kPairs = C::interleaved ? C::columns / 2 : C::columns;  // that begin in one chunk
  static constexpr int kNormed = C::mla ? kPlain : C::head_dim;                // columns under the norm
  static constexpr int kNormedChunks = C::mla ? kPlainChunks : kChunks;
};

// The first column of a lane's chunk, head_dim where the lane has none.
template <class C> HELIX_DEVICE int column(int chunk, int lane) {
  using L = Layout<C>;
  if (chunk < L::kPlainChunks) {
    const int at = chunk * L::kStride + lane * C::columns;
    return at < L::kPlain ? at : C::head_dim;
  }
  const int run = (chunk - L::kPlainChunks) / L::kRunChunks;
  const int at = (chunk - L::kPlainChunks) % L::kRunChunks * L::kStride + lane * C::columns;
  return at < L::kRun ? L::kPlain + run * L::kRun + at : C::head_dim;
}

template <class C> struct Vector {
  Chunk<typename C::Element, C::columns> chunks[Layout<C>::kChunks];
};

template <class C> struct Angles {
  Chunk<float, Layout<C>::kPairs> cos[Layout<C>::kRunChunks], sin[Layout<C>::kRunChunks];
};

// Chunks kFirst to kChunks of each lane; the others, and those that are not there, are 0.
template <class C, int kChunks, int kFirst = 0>
HELIX_DEVICE Vector<C> load(const typename C::Element* plain, const typename C::Element* rotary, int lane, bool active) {
  Vector<C> vector = {};
#pragma unroll
  for (int chunk = kFirst; chunk < kChunks; ++chunk) {
    const int at = column<C>(chunk, lane);
    if (active && at < C::head_dim)
      vector.chunks[chunk].load(chunk < Layout<C>::kPlainChunks ? plain + at : rotary + (at - Layout<C>::kPlain));
  }
  return vector;
}

template <class C> HELIX_DEVICE Angles<C> load_angles(const float* cos, const float* sin, int lane, bool active) {
  using L = Layout<C>;
  Angles<C> angles = {};
#pragma unroll
  for (int chunk = 0; chunk < L::kRunChunks; ++chunk) {
    const int at = chunk * L::kStride + lane * C::columns, pair = at / C::columns * L::kPairs;
    if (active && at < L::kRun) {
      angles.cos[chunk].load(cos + pair);
      angles.sin[chunk].load(sin + pair);
    }
  }
  return angles;
}

// RMSNorm of the first kNormed columns.
template <class C> HELIX_DEVICE void normalize(Vector<C>& vector, const Vector<C>& weight) {
  using L = Layout<C>;
  using Element = typename C::Element;
  float sum = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < L::kNormedChunks; ++chunk)
#pragma unroll
    for (int i = 0; i < C::columns; ++i) {
      const float x = to_float(vector.chunks[chunk].items[i]);
      sum += x * x;
    }
  const float scale = 1.0f / sqrtf(warp_sum<C::lanes>(sum) / L::kNormed + C::norm_eps);
#pragma unroll
  for (int chunk = 0; chunk < L::kNormedChunks; ++chunk)
#pragma unroll
    for (int i = 0; i < C::columns; ++i) {
      const Element normed = from_float<Element>(to_float(vector.chunks[chunk].items[i]) * scale);
      vector.chunks[chunk].items[i] = from_float<Element>(to_float(weight.chunks[chunk].items[i]) * to_float(normed));
    }
}

template <class C> HELIX_DEVICE void rotate(Vector<C>& vector, const Angles<C>& angles) {
  using L = Layout<C>;
  using Element = typename C::Element;
#pragma unroll
  for (int chunk = 0; chunk < L::kRunChunks; ++chunk)
#pragma unroll
    for (int pair = 0; pair < L::kPairs; ++pair) {
      const int first = L::kPlainChunks + chunk, second = C::interleaved ? first : first + L::kRunChunks;
      Element& x = vector.chunks[first].items[C::interleaved ? 2 * pair : pair];
      Element& y = vector.chunks[second].items[C::interleaved ? 2 * pair + 1 : pair];
      const float a = to_float(x), b = to_float(y);
      const float cos = angles.cos[chunk].items[pair], sin = angles.sin[chunk].items[pair];
      x = from_float<Element>(a * cos - b * sin);
      y = from_float<Element>(b * cos + a * sin);
    }
}

template <class C, int kFirst = 0, class To> HELIX_DEVICE void store(To* to, const Vector<C>& vector, int lane) {
#pragma unroll
  for (int chunk = kFirst; chunk < Layout<C>::kChunks; ++chunk) {
    const int at = column<C>(chunk, lane);
    if (at < C::head_dim) converted<To>(vector.chunks[chunk]).store(to + at);
  }
}

// To one token of an FP8 cache. All lanes of the warp take part, also those that are not `active`.
template <class C>
HELIX_DEVICE void store_quantized(float8_e4m3fn* to, u8* scale, const Vector<C>& vector, int lane, bool active) {
  u32 largest = 0;
#pragma unroll
  for (int chunk = 0; chunk < Layout<C>::kChunks; ++chunk) largest = max_bits(largest, vector.chunks[chunk]);
  const u8 byte = scale_of(warp_max_bits<C::lanes>(largest));
  if (!active) return;
  if (lane == 0) *scale = byte;
#pragma unroll
  for (int chunk = 0; chunk < Layout<C>::kChunks; ++chunk) {
    const int at = column<C>(chunk, lane);
    if (at < C::head_dim) quantized(vector.chunks[chunk], byte).store(to + at);
  }
}

// To the token at `slot`: C::block tokens a page, C::kv_heads heads a page.
template <class C>
HELIX_DEVICE void store_token(typename C::Cached* cache, u8* scales, i64 slot, int kv_head, const Vector<C>& vector,
                              int lane, bool active) {
  const i64 token = (slot / C::block * C::kv_heads + kv_head) * C::block + slot % C::block;
  if constexpr (kSame<typename C::Cached, float8_e4m3fn>) {
    store_quantized<C>(cache + token * C::head_dim, scales + token, vector, lane, active);
  } else if (active) {
    store<C>(cache + token * C::head_dim, vector, lane);
  }
}

// Where a row's token goes, and whether. Neither load waits for the other, nor what is loaded of the token for these.
struct Destination {
  bool owned;
  i64 slot;
};
template <class C> HELIX_DEVICE Destination destination(const AppendArguments<C>& a, int row) {
  return row < a.rows ? Destination{a.owned[row] != 0, a.slots[row]} : Destination{false, 0};
}

// Its chunks from kFirst on: the others may be somebody else's, where there is no norm.
template <class C, int kFirst = 0> HELIX_DEVICE void append_query(const AppendArguments<C>& a, int index, int lane) {
  using L = Layout<C>;
  static_assert(kFirst == 0 || !C::qk_norm, "a norm is of all chunks");
  const int row = index / C::heads, head = index % C::heads;
  const bool active = row < a.rows;
  const i64 plain = i64(row) * a.q_plain_row + i64(head) * a.q_plain_head;
  const i64 rotary = i64(row) * a.q_rotary_row + i64(head) * a.q_rotary_head, angle = i64(row) * (C::rope_dim / 2);
  Vector<C> q = load<C, L::kChunks, kFirst>(a.q_plain + plain, a.q_rotary + rotary, lane, active);
  const Angles<C> angles = load_angles<C>(a.cos + angle, a.sin + angle, lane, active);
  if constexpr (C::qk_norm) normalize<C>(q, load<C, L::kNormedChunks>(a.q_norm, a.q_norm + L::kPlain, lane, true));
  rotate<C>(q, angles);
  if (active) store<C, kFirst>(a.q_out + i64(index) * C::head_dim, q, lane);
}

template <class C> HELIX_DEVICE void append_key(const AppendArguments<C>& a, int index, int lane) {
  using L = Layout<C>;
  const int row = index / C::kv_heads, kv_head = index % C::kv_heads;
  const bool active = row < a.rows;
  const Destination to = destination<C>(a, row);
  const i64 angle = i64(row) * (C::rope_dim / 2);
  const typename C::Element* from = a.k + i64(row) * a.k_row + i64(kv_head) * a.k_head;
  Vector<C> k = load<C, L::kChunks>(from, from + L::kPlain, lane, active);
  const Angles<C> angles = load_angles<C>(a.cos + angle, a.sin + angle, lane, active);
  if constexpr (C::mla || C::qk_norm)
    normalize<C>(k, load<C, L::kNormedChunks>(a.k_norm, a.k_norm + L::kPlain, lane, true));
  rotate<C>(k, angles);
  store_token<C>(a.cache_k, a.k_scale, to.slot, kv_head, k, lane, to.owned);
}

template <class C> HELIX_DEVICE void append_value(const AppendArguments<C>& a, int index, int lane) {
  const int row = index / C::kv_heads, kv_head = index % C::kv_heads;
  const Destination to = destination<C>(a, row);
  const typename C::Element* from = a.v + i64(row) * a.v_row + i64(kv_head) * a.v_head;
  const Vector<C> v = load<C, Layout<C>::kChunks>(from, from + Layout<C>::kPlain, lane, row < a.rows);
  store_token<C>(a.cache_v, a.v_scale, to.slot, kv_head, v, lane, to.owned);
}

// Before the wait: the weights of the keys' norm to the L2.
template <class C> HELIX_DEVICE void prefetch_norm(const AppendArguments<C>& a, int lane) {
  if constexpr (C::mla || C::qk_norm)
    for (int chunk = 0; chunk < Layout<C>::kNormedChunks; ++chunk) {
      const int at = column<C>(chunk, lane);
      if (at < Layout<C>::kNormed) prefetch_line(a.k_norm + at);
    }
}

template <class C> HELIX_DEVICE void append(const AppendArguments<C>& a) {
  constexpr int vectors = kWarp / C::lanes;  // of a warp
  const int lane = threadIdx.x % C::lanes, place = int(threadIdx.x) % kWarp / C::lanes;
  const int warp = int(blockIdx.x) * (C::threads / kWarp) + int(threadIdx.x) / kWarp;
  const int keys = (a.rows * C::kv_heads + vectors - 1) / vectors, stored = C::mla ? keys : 2 * keys;  // warps
  if (warp < keys) prefetch_norm<C>(a, lane);
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (warp < keys) {
    append_key<C>(a, warp * vectors + place, lane);
  } else if (warp < stored) {
    if constexpr (!C::mla) append_value<C>(a, (warp - keys) * vectors + place, lane);
  } else if ((warp - stored) * vectors < a.rows * C::heads) {
    append_query<C>(a, (warp - stored) * vectors + place, lane);
  }
}

}  // namespace helix
