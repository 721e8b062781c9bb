// Merge of a unit's parts, left in float32 by the thread blocks that share it (work_split.cuh), within the same launch.
//
//   parts of a block's queries: o [2 * blocks, queries, D] float32 normalised, lse [2 * blocks, queries, D / 4] float32,
//   log2, one copy for each four columns  ->  o bf16, lse natural log
//
// The blocks that share a unit, and one share of its queries, share its merge too: block i of n writes the i-th of n
// slices, from all n parts, so that every word of a part has one reader. Of two blocks, the one that ends with its part
// merges all (gqa_partial.cuh): as a rule, the other began with its part, which is there long before. An unwritten word
// holds -0.0, which no writer writes: readers poll the words themselves, with no fence or flag, and put -0.0 back. All
// blocks are on the GPU at once, so the wait ends. The sums have one order: two runs give the same bits.
// Roofline: latency; 2 * blocks * queries * D * 5 bytes at most, in L2.
#pragma once
#include "helix/gqa_schedule.cuh"
#include "helix/mma.cuh"

namespace helix {

constexpr float kLn2 = 0.6931471805599453f;

// The worker of this block and its share.
template <class C> HELIX_DEVICE u32 worker_of_block() { return blockIdx.x / u32(kShares<C>); }
template <class C> HELIX_DEVICE int share_of_block() { return int(blockIdx.x % u32(kShares<C>)); }
template <class C> HELIX_DEVICE int first_token_of_share() {
  return share_of_block<C>() / kHeadShares<C> * C::share_tokens;
}

// q, o and lse, [B * T, H], are groups of heads: the first query token's of a unit, and from there on the share's query
// `column`.
template <class C> HELIX_DEVICE i64 first_group(int row, int kv_head) {
  return i64(row) * C::query_tokens * C::kv_heads + kv_head;
}
template <class C> HELIX_DEVICE i64 query_offset(int column) {
  i64 offset = 0;
  if constexpr (kShares<C> > 1)
    offset = first_token_of_share<C>() * (C::kv_heads * C::group) + share_of_block<C>() % kHeadShares<C> * C::share_heads;
  if constexpr (C::query_tokens == 1) return offset + column;
  return offset + i64(column / C::share_heads) * (C::kv_heads * C::group) + column % C::share_heads;
}

// Whether the share has this column: the last share of tokens may be smaller than the others.
template <class C> constexpr bool kUneven = C::query_tokens % C::share_tokens != 0;
template <class C> HELIX_DEVICE bool has_query(int column) {
  if constexpr (!kUneven<C>) return column < kQueries<C>;
  return column < kQueries<C> && first_token_of_share<C>() + column / C::share_heads < C::query_tokens;
}

// 1 / sum. One of several query tokens may see nothing of what the others see: its o is then 0.
template <class C> HELIX_DEVICE float inverse_of(float sum) {
  if constexpr (C::query_tokens > 1)
    if (sum == 0.0f) return 0.0f;
  return __fdividef(1.0f, sum);
}

// The softmax state of four neighbouring columns: o = sum of exp2(score - largest) * v, sum = the same without v.
struct Merge {
  float o[4];
  float largest, sum;

  // Of `count` states, in their order; a state with largest -inf counts nothing.
  template <int count>
  HELIX_DEVICE static Merge of(const float4 (&os)[count], const float (&largests)[count], const float (&sums)[count]) {
    Merge merge = {{0.0f, 0.0f, 0.0f, 0.0f}, largests[0], 0.0f};
#pragma unroll
    for (int i = 1; i < count; ++i) merge.largest = fmaxf(merge.largest, largests[i]);
    const float base = is_minus_infinity(merge.largest) ? 0.0f : merge.largest;  // -inf - -inf is NaN
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float weight = exp2_approximate(largests[i] - base);
      merge.sum += sums[i] * weight;
      merge.o[0] += os[i].x * weight;
      merge.o[1] += os[i].y * weight;
      merge.o[2] += os[i].z * weight;
      merge.o[3] += os[i].w * weight;
    }
    return merge;
  }

  HELIX_DEVICE static Merge of_two(const Merge& x, const Merge& y) {
    const float4 os[2] = {x.values(), y.values()};
    const float largests[2] = {x.largest, y.largest}, sums[2] = {x.sum, y.sum};
    return of<2>(os, largests, sums);
  }

  // Of every `wide`-th lane of the warp.
  HELIX_DEVICE void over_lanes(int wide) {
    float most = largest;
    for (int distance = wide; distance < kWarp; distance *= 2)
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
    const float weight = exp2_approximate(largest - (is_minus_infinity(most) ? 0.0f : most));
    largest = most, sum *= weight;
#pragma unroll
    for (int i = 0; i < 4; ++i) o[i] *= weight;
    for (int distance = wide; distance < kWarp; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] += __shfl_xor_sync(0xffffffffu, o[i], distance);
    }
  }

  HELIX_DEVICE float4 values() const { return {o[0], o[1], o[2], o[3]}; }
  HELIX_DEVICE float lse() const { return largest + log2_approximate(sum); }

  template <class C> HELIX_DEVICE void write_result(bfloat16* to, float* lse_to) const {
    const float inverse = inverse_of<C>(sum);
    uint2 packed = {pack_bfloat16(o[0] * inverse, o[1] * inverse), pack_bfloat16(o[2] * inverse, o[3] * inverse)};
    *reinterpret_cast<uint2*>(to) = packed;
    if (lse_to != nullptr) *lse_to = lse() * kLn2;
  }
};

constexpr u32 kUnwritten = 0x80000000u;  // -0.0

HELIX_DEVICE void store_part(float* to, const float4& x) {
  store_relaxed(to, float4{x.x + 0.0f, x.y + 0.0f, x.z + 0.0f, x.w + 0.0f});  // -0.0 + 0.0 is 0.0
}

HELIX_DEVICE void store_part(float* to, float x) { store_relaxed(to, x + 0.0f); }

// The columns of a worker's part, for this block's share of the queries.
template <class C> HELIX_DEVICE int part_of_worker(int worker, int slot) {
  return (2 * (worker * kShares<C> + share_of_block<C>()) + slot) * kQueries<C>;
}

// The parts; all words are -0.0 before and after a launch.
struct MergeSpace {
  float* o;
  float* lse;

  // Dims `dim` to dim + 3 of a part's column; all parts' columns are numbered through.
  template <class C> HELIX_DEVICE void write(int column, int dim, const Merge& merge) const {
    const float inverse = inverse_of<C>(merge.sum);
    const int at = column * C::head_dim + dim;
    store_part(o + at, float4{merge.o[0] * inverse, merge.o[1] * inverse, merge.o[2] * inverse, merge.o[3] * inverse});
    store_part(lse + at / 4, merge.lse());
  }
  // Item `at` is unwritten again.
  HELIX_DEVICE void clear(int at) const {
    reinterpret_cast<uint4*>(o)[at] = uint4{kUnwritten, kUnwritten, kUnwritten, kUnwritten};
    reinterpret_cast<u32*>(lse)[at] = kUnwritten;
  }
};

// Four columns of one part.
struct PartItem {
  u32 x[4], lse;

  HELIX_DEVICE static PartItem none() { return {{0, 0, 0, 0}, 0xff800000u}; }  // lse -inf

  // `at`: the number of the item in the space.
  HELIX_DEVICE void load(const MergeSpace& space, int at) {
    load_relaxed(x, space.o + at * 4);
    load_relaxed(lse, space.lse + at);
  }
  HELIX_DEVICE bool written() const {
    return x[0] != kUnwritten && x[1] != kUnwritten && x[2] != kUnwritten && x[3] != kUnwritten && lse != kUnwritten;
  }
  HELIX_DEVICE float4 values() const {
    return {__uint_as_float(x[0]), __uint_as_float(x[1]), __uint_as_float(x[2]), __uint_as_float(x[3])};
  }
  // Of an item that has been loaded: again, until it is written.
  HELIX_DEVICE void poll(const MergeSpace& space, int at) {
    for (u32 polls = 0; !written(); ++polls) {
      if (polls == kMostPolls) __trap();
      load(space, at);
    }
  }
  HELIX_DEVICE Merge state() const {
    const float4 o = values();
    return {{o.x, o.y, o.z, o.w}, __uint_as_float(lse), 1.0f};
  }
};

// Room for each warp's states of up to 32 items.
template <int threads> struct MergeShared { Merge of_warp[threads / kWarp][kWarp]; };

// Threads below `wide`, a power of two, get the merge of those that hold the same item.
template <int threads> HELIX_DEVICE Merge over_warps(Merge merge, MergeShared<threads>& shared, int wide, int thread) {
  constexpr int warps = threads / kWarp;
  const int lane = thread % kWarp, stride = wide <= kWarp ? 1 : wide / kWarp;
  shared.of_warp[thread / kWarp][lane] = merge;
  named_barrier_diverged<1, threads>();
  if (wide <= kWarp) {
    float4 os[warps];
    float largests[warps], sums[warps];
#pragma unroll
    for (int i = 0; i < warps; ++i) {
      const Merge& other = shared.of_warp[i][lane];
      os[i] = other.values(), largests[i] = other.largest, sums[i] = other.sum;
    }
    merge = Merge::of<warps>(os, largests, sums);
  } else if (thread < wide) {
    for (int warp = thread / kWarp + stride; warp < warps; warp += stride)
      merge = Merge::of_two(merge, shared.of_warp[warp][lane]);
  }
  named_barrier_diverged<1, threads>();  // before the next unit's states
  return merge;
}

// The block's slices of up to two units, side by side: all `threads` threads call it. Neighbouring threads take
// neighbouring items, and the threads to spare share the parts: thread t has item t % wide of every (threads / wide)-th
// part. The warps' states meet in shared memory.
template <class C, int threads>
HELIX_DEVICE void merge_slices(bfloat16* o, float* lse, const MergeSpace& space, const MergePlan (&plans)[2],
                               MergeShared<threads>& shared, int thread) {
  constexpr int vectors = C::head_dim / 4, batch = 6;
  const int of_first = plans[0].end - plans[0].begin, items = of_first + plans[1].end - plans[1].begin;
  int wide = 4;
  while (wide < threads && wide < items) wide *= 2;
  const int first_part = thread / wide, stride = threads / wide;
  for (int base = 0; base < items; base += wide) {
    const int mine = base + thread % wide;
    const MergePlan& plan = plans[mine < of_first ? 0 : 1];
    const int item = plan.begin + (mine < of_first ? mine : mine - of_first), count = mine < items ? plan.count : 0;
    Merge merge = {{0.0f, 0.0f, 0.0f, 0.0f}, minus_infinity(), 0.0f};
    for (int first = first_part; first < count; first += stride * batch) {
      PartItem parts[batch];
      int at[batch];
      u32 present = 0;
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int part = first + i * stride;
        // The unit's first block may have left its part in its second slot (work_split.cuh).
        at[i] = part_of_worker<C>(plan.first + part, part == 0 ? plan.first_is_later_slot : 0) * vectors + item;
        parts[i] = PartItem::none();
        present |= u32(part < count) << i;
      }
      u32 missing = present;
      for (u32 polls = 0; missing; ++polls) {
        if (polls == kMostPolls) __trap();
#pragma unroll
        for (int i = 0; i < batch; ++i)
          if (missing >> i & 1) parts[i].load(space, at[i]);
#pragma unroll
        for (int i = 0; i < batch; ++i)
          if (missing >> i & 1 && parts[i].written()) missing ^= 1u << i;
      }
      float4 os[batch];
      float largests[batch], sums[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        os[i] = parts[i].values(), largests[i] = __uint_as_float(parts[i].lse), sums[i] = 1.0f;
        if (present >> i & 1) space.clear(at[i]);
      }
      merge = Merge::of_two(merge, Merge::of<batch>(os, largests, sums));
    }
    if (wide < kWarp) merge.over_lanes(wide);
    if (wide < threads) merge = over_warps<threads>(merge, shared, wide, thread);
    if (thread < wide && mine < items) {
      const int column = item / vectors, dim = item % vectors * 4;
      if constexpr (kUneven<C>)
        if (!has_query<C>(column)) continue;
      const i64 query = first_group<C>(plan.row, plan.kv_head) * C::group + query_offset<C>(column);
      merge.template write_result<C>(o + query * C::head_dim + dim, dim == 0 ? lse + query : nullptr);
    }
  }
}

}  // namespace helix
