// Partial: attention of T query tokens a row over this rank's paged KV, split over the cached tokens.
//
//   q [N, H, D] with N = B * T, cache k (and v), page_table [B, max_pages], lengths [N]  ->
//   o [S, N, H, P] float32, normalised by its own softmax sum, and lse [S, N, H] float32, natural log
//   MLA: cache k [pages, block, D], v = its first P columns.  GQA: cache k, v [pages, KH, block, D], P = D.
//   FP8 caches have scales beside them, a byte in place of the columns.
//
// Grid (head tiles, N, S). One thread block: one query token, up to head_tile query heads that share a KV head, one
// split. It walks its tokens in tiles: copy K (and V) to shared memory, scores, running softmax, accumulate O in
// registers. A split, or a query, without tokens gives o = 0 and lse = -inf. Nothing beyond lengths[n] is read: the rest
// of the last tile is zero-filled, because those pages may hold NaN and 0 * NaN = NaN.
// Shared memory: q head_tile*D*4, K token_tile*(D*size + 4) with size 2 for FP8, V the same for GQA, scores
// head_tile*token_tile*4 bytes.
// Roofline: memory, length * kv_width elements a KV head and query, read once a head tile. This version computes with
// scalar FMAs, does not overlap copies with arithmetic, and reads a row's KV anew for each of its query tokens.
#pragma once
#include "helix/warp.cuh"

namespace helix {

// What shared memory holds of a cached element: FP8 times its scale is exact in bfloat16.
template <class Cached> struct Tiled { using Type = Cached; };
template <> struct Tiled<float8_e4m3fn> { using Type = bfloat16; };

template <class C> struct PartialTile {
  using Element = typename Tiled<typename C::Cached>::Type;
  static constexpr int kVector = int(sizeof(Vector16) / sizeof(Element));           // elements a 16-byte vector
  static constexpr int kStride = C::head_dim + int(sizeof(u32) / sizeof(Element));  // one odd word: no bank conflicts
  float q[C::head_tile][C::head_dim];
  float score[C::head_tile][C::token_tile];
  float largest[C::head_tile], sum[C::head_tile], rescale[C::head_tile];
  alignas(4) Element k[C::token_tile * kStride];
  alignas(4) Element v[C::mla ? 1 : C::token_tile * kStride];
};

// One vector of a cached token: `column` and what follows it. Only an FP8 cache has scales.
template <class C, class Cached>
HELIX_DEVICE Vector16 load_vector(const Cached* cache, const u8*, i64 token, int column) {
  return *reinterpret_cast<const Vector16*>(cache + token * C::head_dim + column);
}

template <class C>
HELIX_DEVICE Vector16 load_vector(const float8_e4m3fn* cache, const u8* scales, i64 token, int column) {
  const float scale = scale_to_float(scales[token]);
  const u64 elements = *reinterpret_cast<const u64*>(cache + token * C::head_dim + column);
  Vector16 vector;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    u32 pair[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float8_e4m3fn element = {u8(elements >> (16 * word + 8 * half))};
      pair[half] = from_float<bfloat16>(to_float(element) * scale).bits;
    }
    vector.words[word] = pair[0] | pair[1] << 16;
  }
  return vector;
}

// Copies tokens [begin, begin + token_tile) of one row and KV head; tokens from `end` on become zero.
template <class C>
HELIX_DEVICE void load_tile(typename PartialTile<C>::Element* tile, const typename C::Cached* cache, const u8* scales,
                            const int* pages, int kv_head, int begin, int end) {
  using Tile = PartialTile<C>;
  constexpr int vectors = C::head_dim / Tile::kVector;
  for (int i = threadIdx.x; i < C::token_tile * vectors; i += C::threads) {
    const int token = i / vectors, column = i % vectors * Tile::kVector, position = begin + token;
    Vector16 data = {};
    if (position < end) {
      const i64 head = i64(pages[position / C::block]) * C::kv_heads + kv_head;
      data = load_vector<C>(cache, scales, head * C::block + position % C::block, column);
    }
    u32* words = reinterpret_cast<u32*>(tile + token * Tile::kStride + column);
#pragma unroll
    for (int word = 0; word < 4; ++word) words[word] = data.words[word];
  }
}

// score[h][t] = scale * q[h] . k[t], -inf from `end` on.
template <class C> HELIX_DEVICE void score_tile(PartialTile<C>& tile, int begin, int end) {
  for (int i = threadIdx.x; i < C::head_tile * C::token_tile; i += C::threads) {
    const int head = i / C::token_tile, token = i % C::token_tile;
    const auto* k = tile.k + token * PartialTile<C>::kStride;
    float dot = 0.0f;
#pragma unroll 8
    for (int d = 0; d < C::head_dim; ++d) dot += tile.q[head][d] * to_float(k[d]);
    tile.score[head][token] = begin + token < end ? dot * C::scale : minus_infinity();
  }
}

// One warp a head: turns scores into weights exp(score - largest), and says how to rescale what came before.
template <class C> HELIX_DEVICE void softmax_tile(PartialTile<C>& tile) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int head = warp; head < C::head_tile; head += C::threads / kWarp) {
    float largest = tile.largest[head];
    for (int t = lane; t < C::token_tile; t += kWarp) largest = fmaxf(largest, tile.score[head][t]);
    largest = warp_max(largest);
    float sum = 0.0f;
    for (int t = lane; t < C::token_tile; t += kWarp) {
      const float weight = expf(tile.score[head][t] - largest);
      tile.score[head][t] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const float rescale = expf(tile.largest[head] - largest);
      tile.rescale[head] = rescale;
      tile.sum[head] = tile.sum[head] * rescale + sum;
      tile.largest[head] = largest;
    }
    __syncwarp();
  }
}

template <class C>
HELIX_DEVICE void partial(float* o, float* lse, const typename C::Element* q, const typename C::Cached* cache_k,
                          const typename C::Cached* cache_v, const u8* k_scale, const u8* v_scale,
                          const int* page_table, const int* lengths, int max_pages) {
  constexpr int group = C::heads / C::kv_heads, tiles_per_group = (group + C::head_tile - 1) / C::head_tile;
  constexpr int kOutputs = (C::head_tile * C::partial_dim + C::threads - 1) / C::threads;  // of each thread
  __shared__ PartialTile<C> tile;

  const int kv_head = blockIdx.x / tiles_per_group;
  const int first = int(blockIdx.x) % tiles_per_group * C::head_tile;  // head within the group
  const int heads = min(C::head_tile, group - first);                  // the last tile may be smaller
  const int query = blockIdx.y, split = blockIdx.z;
  const i64 head_row = i64(query) * C::heads + kv_head * group + first;
  const int* pages = page_table + i64(query / C::query_tokens) * max_pages;

  // Whole tiles are dealt to the splits, so that only the last one masks.
  const int length = lengths[query], tiles = (length + C::token_tile - 1) / C::token_tile;
  const int share = (tiles + int(gridDim.z) - 1) / int(gridDim.z) * C::token_tile;
  const i64 begin = i64(split) * share;
  const int end = int(min(begin + share, i64(length)));

  for (int i = threadIdx.x; i < C::head_tile * C::head_dim; i += C::threads)
    tile.q[i / C::head_dim][i % C::head_dim] = i / C::head_dim < heads ? to_float(q[head_row * C::head_dim + i]) : 0.0f;
  for (int head = threadIdx.x; head < C::head_tile; head += C::threads) {
    tile.largest[head] = minus_infinity();
    tile.sum[head] = 0.0f;
  }
  float outputs[kOutputs] = {};

  for (i64 at = begin; at < end; at += C::token_tile) {
    __syncthreads();  // the previous tile has been used, and q is complete
    load_tile<C>(tile.k, cache_k, k_scale, pages, kv_head, int(at), end);
    if constexpr (!C::mla) load_tile<C>(tile.v, cache_v, v_scale, pages, kv_head, int(at), end);
    __syncthreads();
    score_tile<C>(tile, int(at), end);
    __syncthreads();
    softmax_tile<C>(tile);
    __syncthreads();
    const auto* values = C::mla ? tile.k : tile.v;
#pragma unroll
    for (int n = 0; n < kOutputs; ++n) {
      const int i = threadIdx.x + n * C::threads, head = i / C::partial_dim, column = i % C::partial_dim;
      if (head >= C::head_tile) continue;
      float sum = outputs[n] * tile.rescale[head];
#pragma unroll 8
      for (int t = 0; t < C::token_tile; ++t)
        sum += tile.score[head][t] * to_float(values[t * PartialTile<C>::kStride + column]);
      outputs[n] = sum;
    }
  }
  __syncthreads();  // sum and largest, also where there was no tile

  const i64 out = (i64(split) * gridDim.y) * C::heads + head_row;
#pragma unroll
  for (int n = 0; n < kOutputs; ++n) {
    const int i = threadIdx.x + n * C::threads, head = i / C::partial_dim;
    if (head >= heads) continue;
    o[out * C::partial_dim + i] = begin < end ? outputs[n] / tile.sum[head] : 0.0f;
  }
  for (int head = threadIdx.x; head < heads; head += C::threads)
    lse[out + head] = begin < end ? tile.largest[head] + logf(tile.sum[head]) : minus_infinity();
}

}  // namespace helix
