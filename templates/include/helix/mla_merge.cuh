// Merge: the partials of split rows into o and lse, weighted by their LSE; whole rows are not touched.
//
//   part_o [n, Q, P], part_lse [n, Q], split rows (mla_schedule.cuh) -> o [B, Q, P] bf16, lse [B, Q]
//
// A strip is 256 columns of one query of one row, so that a warp loads 8 columns a lane. One, 4 or 16 warps share a
// strip, the more the more partials there are: each has all its loads in flight at once. A batch is the strips that a
// block's warps merge at a time; the batches of all rows are dealt to the blocks in turn. Who merges what follows from
// the schedule, which is older than the previous kernel and so read before that is waited for. Roofline: L2.
#pragma once
#include "helix/mla_schedule.cuh"
#include "helix/sm90.cuh"
#include "helix/warp.cuh"

namespace helix {

HELIX_DEVICE void load_eight(float (&x)[8], const bfloat16* from) {
  const Vector16 v = load_global(from);
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
template <class C, int kBatch = 8>
HELIX_DEVICE Merged merge_strip(const bfloat16* part_o, const float* part_lse, SplitRow row, int head,
                                int column, int first, int stride) {
  Merged sum;
  for (int base = first; base < row.count; base += stride * kBatch) {
    float values[kBatch][8], weight[kBatch], largest = sum.top;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int n = base + i * stride;
      const i64 at = (i64(row.first) + min(n, row.count - 1)) * C::queries + head;
      weight[i] = n < row.count ? part_lse[at] : minus_infinity();
      load_eight(values[i], part_o + at * C::partial_dim + column);
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

// Warps that share a strip of a row of so many partials.
template <class C> HELIX_DEVICE int sharers_of(int partials) {
  return partials <= 8 ? 1 : partials <= 32 ? 4 : C::threads / 32;
}

// The split rows, and the first batch of each: first_batch[count] is how many there are. Called by the whole block.
template <class C>
HELIX_DEVICE void deal_batches(SplitRow* rows, int* first_batch, const SplitRow* split, int count) {
  constexpr int kUnshared = C::queries * (C::partial_dim / 256) / (C::threads / 32);  // batches with one warp a strip
  static_assert(kUnshared * (C::threads / 32) * 256 == C::queries * C::partial_dim, "batches are whole");
  const int lane = int(threadIdx.x) % 32;
  for (int i = threadIdx.x; i < count; i += C::threads) rows[i] = split[i];
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int base = 0; base < count; base += 32) {
      const int batches = base + lane < count ? sharers_of<C>(rows[base + lane].count) * kUnshared : 0;
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

template <class C>
HELIX_DEVICE void merge_splits(bfloat16* o, float* lse, const bfloat16* part_o, const float* part_lse,
                               const SplitRow* split, const int* split_count) {
  constexpr int kWarps = C::threads / 32, kPieces = C::partial_dim / 256;
  __shared__ SplitRow rows[C::max_splits];
  __shared__ int first_batch[C::max_splits + 1];
  __shared__ float sums[kWarps][256], tops[kWarps], totals[kWarps];
  const int count = *split_count, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  deal_batches<C>(rows, first_batch, split, count);
  wait_for_previous_kernels();
  let_next_kernel_start();
  for (int batch = blockIdx.x; batch < first_batch[count]; batch += gridDim.x) {
    const int dealt = row_of_batch(first_batch, count, batch);
    const SplitRow row = rows[dealt];
    const i64 out = i64(row.row) * C::queries;
    const int sharers = sharers_of<C>(row.count), strips = kWarps / sharers;
    const int first = (batch - first_batch[dealt]) * strips, strip = first + warp / sharers;
    const int head = strip / kPieces, column = strip % kPieces * 256 + lane * 8;
    const Merged mine = merge_strip<C>(part_o, part_lse, row, head, column, warp % sharers, sharers);
    if (sharers == 1) {
      Vector16 packed;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        packed.words[c] = pack_bfloat16(mine.values[2 * c] / divisor<C>(mine.total),
                                        mine.values[2 * c + 1] / divisor<C>(mine.total));
      store_global(o + (out + head) * C::partial_dim + column, packed);
      if (column == 0) lse[out + head] = mine.top + logf(mine.total);
      continue;
    }
    if (lane == 0) tops[warp] = mine.top, totals[warp] = mine.total;
#pragma unroll
    for (int c = 0; c < 8; ++c) sums[warp][c * 32 + lane] = mine.values[c];
    __syncthreads();
    for (int x = threadIdx.x; x < strips * 256; x += C::threads) {
      const int begin = x / 256 * sharers, at = x % 256;
      float largest = minus_infinity(), all = 0.0f, sum = 0.0f;
      for (int w = begin; w < begin + sharers; ++w) largest = fmaxf(largest, tops[w]);
      for (int w = begin; w < begin + sharers; ++w) {
        const float weight = __expf(tops[w] - finite<C>(largest));
        all += weight * totals[w];
        sum += weight * sums[w][at];
      }
      const int which = first + x / 256, c = which % kPieces * 256 + at % 32 * 8 + at / 32;
      o[(out + which / kPieces) * C::partial_dim + c] = from_float<bfloat16>(sum / divisor<C>(all));
      if (c == 0) lse[out + which / kPieces] = largest + logf(all);
    }
    __syncthreads();
  }
}

}  // namespace helix
