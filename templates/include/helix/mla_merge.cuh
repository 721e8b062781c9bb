// Merge: the partials of split rows into o and lse, weighted by their LSE; whole rows are not touched.
//
//   part_o [n, Q, P], part_lse [n, Q], split rows (mla_schedule.cuh) -> o [B, Q, P] bf16, lse [B, Q]
//
// A strip is 128 or 256 columns of one query of one row, 8 columns a lane, so that a warp loads of one or two partials
// at once. One, 4 or 16 warps share a strip, the more the more partials there are: each has all its loads in flight at
// once. A batch is the strips that a block's warps merge at a time; the batches of all rows are dealt to the blocks in
// turn. Who merges what follows from the schedule, which is older than the previous kernel and so read before that is
// waited for. Roofline: L2; with few partials, the way from one kernel to the next.
#pragma once
#include "helix/mla_schedule.cuh"
#include "helix/sm90.cuh"
#include "helix/warp.cuh"

namespace helix {

HELIX_DEVICE void load_eight(float (&x)[8], const bfloat16* from, bool there) {
  const Vector16 v = there ? load_global(from) : Vector16{};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(bfloat16{u16(v.words[i / 2] >> (i % 2 * 16))});
}

struct Merged {  // of a lane's 8 columns, relative to exp(top)
  float top = minus_infinity(), total = 0.0f, values[8] = {};
};

// Of several query tokens one may have no token to attend to, in a partial or at all: 0 is its sum, -inf its top.
template <class C> HELIX_DEVICE float divisor(float total) { return C::row_tokens > 1 && total == 0.0f ? 1.0f : total; }
template <class C> HELIX_DEVICE float finite(float top) {
  return C::row_tokens > 1 && is_minus_infinity(top) ? 0.0f : top;
}

// Partials first, first + stride, ... of one strip, so many at a time.
template <class C, int kBatch>
HELIX_DEVICE Merged merge_strip(const bfloat16* part_o, const float* part_lse, SplitRow row, int head,
                                int column, int first, int stride) {
  Merged sum;
  const u32 first_query = u32(row.first) * C::queries + u32(head);
  const float* lse = part_lse + first_query;
  const bfloat16* o = part_o + i64(first_query) * C::partial_dim + column;
  for (int base = first; base < row.count; base += stride * kBatch) {
    float values[kBatch][8], weight[kBatch], largest = sum.top;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const u32 n = u32(base + i * stride);
      const bool there = int(n) < row.count;
      weight[i] = there ? lse[n * C::queries] : minus_infinity();
      load_eight(values[i], o + n * (C::queries * C::partial_dim), there);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) largest = fmaxf(largest, weight[i]);
    const float keep = __expf(sum.top - finite<C>(largest));
    sum.total *= keep;
#pragma unroll
    for (int c = 0; c < 8; ++c) sum.values[c] *= keep;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float w = __expf(weight[i] - finite<C>(largest));
      sum.total += w;
#pragma unroll
      for (int c = 0; c < 8; ++c) sum.values[c] = fmaf(w, values[i][c], sum.values[c]);
    }
    sum.top = largest;
  }
  return sum;
}

// Of the lanes of a warp that hold the same columns, kLanes apart; all of them get it.
template <int kLanes> HELIX_DEVICE void merge_over_lanes(Merged& sum) {
  float largest = sum.top;
#pragma unroll
  for (int distance = kLanes; distance < kWarp; distance *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  const float weight = is_minus_infinity(largest) ? 0.0f : __expf(sum.top - largest);  // no split is this warp's
  sum.top = largest, sum.total *= weight;
#pragma unroll
  for (int c = 0; c < 8; ++c) sum.values[c] *= weight;
#pragma unroll
  for (int distance = kLanes; distance < kWarp; distance *= 2) {
    sum.total += __shfl_xor_sync(0xffffffffu, sum.total, distance);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum.values[c] += __shfl_xor_sync(0xffffffffu, sum.values[c], distance);
  }
}

constexpr __device__ int log2_of(int x) { return x == 1 ? 0 : 1 + log2_of(x / 2); }

// Few queries have narrow strips, so that these lie on more multiprocessors. And the next kernel may start before the
// previous one is done: if that is attention, it fetches KV on the multiprocessors without a strip. With more queries
// there are few such, and KV would only be in the way of the partials. Measured for 16 queries, and for 64 and 128.
// What attention reads before it waits is older than the previous kernel, too, which has waited itself before.
template <class C> constexpr bool kNarrow = C::queries <= 16;
template <class C> constexpr int kStripLanes = kNarrow<C> ? 16 : 32;  // that have a strip's columns
template <class C> constexpr int kStripColumns = kStripLanes<C> * 8;

// Log2 of how many warps share a strip of a row of so many partials.
template <class C> HELIX_DEVICE int sharing(int partials) {
  return partials <= 8 ? 0 : partials <= 32 ? 2 : log2_of(C::threads / 32);
}

// The split rows, and the first batch of each: first_batch[count] is how many there are. Called by the whole block.
template <class C>
HELIX_DEVICE void deal_batches(SplitRow* rows, int* first_batch, const SplitRow* split, int count) {
  // Batches with one warp a strip.
  constexpr int kUnshared = C::queries * (C::partial_dim / kStripColumns<C>) / (C::threads / 32);
  static_assert(kUnshared * (C::threads / 32) * kStripColumns<C> == C::queries * C::partial_dim, "batches are whole");
  const int lane = int(threadIdx.x) % 32;
  for (int i = threadIdx.x; i < count; i += C::threads) rows[i] = split[i];
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int base = 0; base < count; base += 32) {
      const int batches = base + lane < count ? kUnshared << sharing<C>(rows[base + lane].count) : 0;
      const int through = before + inclusive_scan(batches, lane);
      if (base + lane < count) first_batch[base + lane] = through - batches;
      before = __shfl_sync(0xffffffffu, through, 31);
    }
    if (lane == 0) first_batch[count] = before;
  }
  __syncthreads();
}

// The row to which a batch belongs. Called by whole warps.
HELIX_DEVICE int row_of_batch(const int* first_batch, int count, int batch) {
  int begun = 0;
  for (int base = 0; base < count; base += 32) {
    const int row = base + int(threadIdx.x) % 32;
    begun += __popc(__ballot_sync(0xffffffffu, row < count && first_batch[row] <= batch));
  }
  return begun - 1;
}

template <class C> struct StripSums {
  static constexpr int kWarps = C::threads / 32;
  float values[kWarps][kStripColumns<C>], tops[kWarps], totals[kWarps];  // a lane's columns are kStripLanes apart
};

// Strips from the `first` on, kSharers warps' sums each, to o and lse of the queries from `out` on. How many they are
// is known, so that no sum waits for the one before.
template <class C, int kSharers>
HELIX_DEVICE void add_sharers(bfloat16* o, float* lse, const StripSums<C>& sums, i64 out, int first) {
  constexpr int kPieces = C::partial_dim / kStripColumns<C>;
  for (int x = threadIdx.x; x < StripSums<C>::kWarps / kSharers * kStripColumns<C>; x += C::threads) {
    const int begin = x / kStripColumns<C> * kSharers, at = x % kStripColumns<C>;
    float largest = minus_infinity(), all = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kSharers; ++w) largest = fmaxf(largest, sums.tops[begin + w]);
#pragma unroll
    for (int w = 0; w < kSharers; ++w) {
      const float weight = __expf(sums.tops[begin + w] - finite<C>(largest));
      all += weight * sums.totals[begin + w];
      sum += weight * sums.values[begin + w][at];
    }
    const int which = first + x / kStripColumns<C>;
    const int c = which % kPieces * kStripColumns<C> + at % kStripLanes<C> * 8 + at / kStripLanes<C>;
    o[(out + which / kPieces) * C::partial_dim + c] = from_float<bfloat16>(sum / divisor<C>(all));
    if (c == 0) lse[out + which / kPieces] = largest + logf(all);
  }
}

// What a warp has to do for a batch. Called by whole warps.
template <class C> struct MergeTask {
  static constexpr int kPieces = C::partial_dim / kStripColumns<C>;
  SplitRow row;
  int shared, first, head, column;  // log2 of the sharers; the batch's first strip; where the warp's own is
  HELIX_DEVICE MergeTask(const SplitRow* rows, const int* first_batch, int count, int batch) {
    const int dealt = row_of_batch(first_batch, count, batch);
    row = rows[dealt];
    shared = sharing<C>(row.count);
    first = (batch - first_batch[dealt]) * (StripSums<C>::kWarps >> shared);
    const int strip = first + (int(threadIdx.x) / 32 >> shared);
    head = strip / kPieces, column = strip % kPieces * kStripColumns<C> + int(threadIdx.x) % kStripLanes<C> * 8;
  }
};

template <class C>
HELIX_DEVICE void merge_splits(bfloat16* o, float* lse, const bfloat16* part_o, const float* part_lse,
                               const SplitRow* split, const int* split_count) {
  constexpr int kWarps = StripSums<C>::kWarps, kLanes = kStripLanes<C>, kSlots = kWarp / kLanes;
  constexpr int kBatch = kNarrow<C> ? 5 : 8;  // partials that a warp has under way, kSlots a load
  __shared__ SplitRow rows[C::max_splits];
  __shared__ int first_batch[C::max_splits + 1];
  __shared__ StripSums<C> sums;
  const int count = *split_count, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  deal_batches<C>(rows, first_batch, split, count);
  int batch = int(blockIdx.x);
  if (batch >= first_batch[count]) {
    // Leaves its multiprocessor to the next kernel; but some block must end no sooner than the previous kernel.
    if (batch == 0) wait_for_previous_kernels();
    return;
  }
  MergeTask<C> task(rows, first_batch, count, batch);
  if constexpr (kNarrow<C>) let_next_kernel_start();
  wait_for_previous_kernels();
  if constexpr (!kNarrow<C>) let_next_kernel_start();
  while (true) {
    const i64 out = i64(task.row.row) * C::queries;
    const int sharers = 1 << task.shared, slot = warp % sharers * kSlots + lane / kLanes;
    Merged mine = merge_strip<C, kBatch>(part_o, part_lse, task.row, task.head, task.column, slot, sharers * kSlots);
    if (kSlots > 1) merge_over_lanes<kLanes>(mine);
    if (sharers == 1) {
      Vector16 packed;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        packed.words[c] = pack_bfloat16(mine.values[2 * c] / divisor<C>(mine.total),
                                        mine.values[2 * c + 1] / divisor<C>(mine.total));
      if (lane < kLanes) store_global(o + (out + task.head) * C::partial_dim + task.column, packed);
      if (lane == 0 && task.column == 0) lse[out + task.head] = mine.top + logf(mine.total);
    } else {
      if (lane == 0) sums.tops[warp] = mine.top, sums.totals[warp] = mine.total;
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (lane < kLanes) sums.values[warp][c * kLanes + lane] = mine.values[c];
      __syncthreads();
      if (sharers == kWarps) add_sharers<C, kWarps>(o, lse, sums, out, task.first);
      else add_sharers<C, 4>(o, lse, sums, out, task.first);
      __syncthreads();
    }
    batch += int(gridDim.x);
    if (batch >= first_batch[count]) return;
    task = MergeTask<C>(rows, first_batch, count, batch);
  }
}

}  // namespace helix
