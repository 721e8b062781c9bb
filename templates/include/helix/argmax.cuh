// Argmax: of each row, the index of its largest logit among the columns of all ranks of a group, in one launch.
//
//   logits [rows, columns] of this rank, whose first is column `first` of all  ->  indices [rows], the same on every rank
//
// Of equal logits the lowest index; NaN is larger than any number, and -0 is 0: torch's argmax of all columns in float32.
// Each rank sends its best logit and where it is to every other. An inbox holds [2 halves][N senders][max_rows] of these
// two words.
//
// One thread block a row. Shared memory: two words a warp. Roofline: one multiprocessor's way to the L2, where the
// logits lie, and the way to the other GPUs and back.
#pragma once
#include "helix/inbox.cuh"
#include "helix/ordered.cuh"
#include "helix/warp.cuh"

namespace helix {

struct Best {
  u32 key;
  int index;
};

// Of equal keys the lower index wins.
HELIX_DEVICE Best better(Best a, Best b) { return b.key > a.key || (b.key == a.key && b.index < a.index) ? b : a; }
HELIX_DEVICE Best warp_best(Best mine) {
  const u32 key = __reduce_max_sync(0xffffffffu, mine.key);
  return {key, int(__reduce_min_sync(0xffffffffu, mine.key == key ? u32(mine.index) : 0xffffffffu))};
}

// The order of logits; numbers that compare as equal have one key.
HELIX_DEVICE u32 logit_key(float x) { return x != x ? 0xffffffffu : ordered(x + 0.0f); }

// The best of a row's columns, as far as this thread looks.
template <class C> HELIX_DEVICE Best best_of_thread(const typename C::Element* row, int columns) {
  using Element = typename C::Element;
  constexpr int width = 16 / int(sizeof(Element));
  const int vectors = u64(row) % 16 == 0 ? columns / width : 0;  // rows of odd width start anywhere
  Best best = {kTaken, 0x7fffffff};
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += C::threads) {
    const Vector16 v = reinterpret_cast<const Vector16*>(row)[i];
#pragma unroll
    for (int e = 0; e < width; ++e)
      best = better(best, {logit_key(to_float(reinterpret_cast<const Element*>(v.words)[e])), i * width + e});
  }
#pragma unroll 4
  for (int i = vectors * width + int(threadIdx.x); i < columns; i += C::threads)
    best = better(best, {logit_key(to_float(row[i])), i});
  return best;
}

template <class C>
HELIX_DEVICE void argmax(i64* indices, const typename C::Element* logits, const Group& group, int columns, int first,
                         int max_rows) {
  constexpr int warps = C::threads / kWarp;
  static_assert(warps <= kWarp, "a lane for each warp's best");
  __shared__ Best found[warps];
  const int thread = threadIdx.x, lane = thread % kWarp;
  const i64 row = blockIdx.x;
  wait_for_previous_kernels();
  let_next_kernel_start();
  Best best = warp_best(best_of_thread<C>(logits + row * columns, columns));
  if (lane == 0) found[thread / kWarp] = best;
  __syncthreads();
  if (thread >= kWarp) return;
  best = warp_best(found[lane < warps ? lane : 0]);
  best.index += first;
  const auto place = [&](int inbox, int sender) {
    return reinterpret_cast<u32*>(group.inbox(inbox)) +
           ((i64(group.half()) * C::members + sender) * max_rows + row) * 2;
  };
  Best all = best;
  for (int member = lane; member < C::members; member += kWarp) {
    if (member == group.rank) continue;
    u32* to = place(member, group.rank);
    store_to_peer(to, sendable(u32(__float_as_int(score_of(best.key)))));
    store_to_peer(to + 1, u32(best.index));
  }
  for (int member = lane; member < C::members; member += kWarp) {
    if (member == group.rank) continue;
    u32* from = place(group.rank, member);
    const float logit = __int_as_float(int(receive(from, group, member)));
    all = better(all, {logit_key(logit), int(receive(from + 1, group, member))});
    forget(from);
    forget(from + 1);
  }
  all = warp_best(all);
  if (lane == 0) indices[row] = all.index;
}

}  // namespace helix
