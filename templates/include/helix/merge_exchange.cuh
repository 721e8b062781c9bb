// Exchange of partials that are still in splits: what mla_merge.cuh does, what exchange.cuh does, in one launch.
//
//   whole rows: o [rows, N * H, P] bf16, lse [rows, N * H];  split rows (mla_schedule.cuh): part_o [n, Q, P] bf16,
//   part_lse [n, Q], Q = row_tokens * N * H  ->  o_out [rows, H, P] over all N ranks' KV
//
// The first `mergers` thread blocks merge the splits and send what comes of them, in bf16, straight to the ranks whose
// heads they are, this one included: every part has one way in, the inbox. The others exchange a head a warp, as
// exchange.cuh has it. A piece is 64 columns of one head, which 8 lanes hold, so that a warp reads four partials at
// once; few partials are merged by a warp, many by all warps of a thread block. A piece has its own LSE in the inbox:
// no thread block knows when the others send theirs.
//
// Mergers wait for nobody, and the others only for mergers and for what other GPUs send of the same row and head.
// Thread blocks start in the order of their numbers: so some head can always go on, however few of them are on the GPU
// at once, and whichever rows each rank has split.
//
// Programmatic dependent launch: which rows are split stands in the schedule, which is older than the kernel before and
// read before that has ended; splits, o and lse are not. Roofline: L2, the splits, then NVLink (exchange.cuh).
#pragma once
#include "helix/exchange.cuh"
#include "helix/mla_merge.cuh"

namespace helix {

constexpr int kPieceLanes = 8, kPieceColumns = kPieceLanes * 8;

struct Splits {
  const bfloat16* part_o;
  const float* part_lse;
  const SplitRow* rows;
  const int* count;  // [1], of rows
};

template <class C> struct PieceMerge {
  static constexpr int kWarps = C::threads / kWarp, kSlots = kWarp / kPieceLanes;  // partials that a warp reads at once
  static_assert(C::pieces * kPieceColumns == C::partial_dim && C::queries * C::pieces % kWarps == 0, "whole batches");

  // A batch is what a thread block merges at a time: a piece if a row has many partials, else a piece a warp.
  HELIX_DEVICE static bool many(int partials) { return partials > kSlots * C::batch; }
  HELIX_DEVICE static int batches(int partials) {
    return C::queries * C::pieces / kWarps * (many(partials) ? kWarps : 1);
  }
};

struct Dealt { SplitRow row; int batch; };  // of that row; none: the row has no partials

// Batch `batch` of all split rows, in their order. Called by whole warps.
template <class C> HELIX_DEVICE Dealt deal_batch(const Splits& splits, int count, int batch) {
  const int lane = int(threadIdx.x) % kWarp;
  int before = 0;
  for (int base = 0; base < count; base += kWarp) {
    const bool there = base + lane < count;
    const SplitRow row = there ? splits.rows[base + lane] : SplitRow{0, 0, 0, 0};
    const int batches = there ? PieceMerge<C>::batches(row.count) : 0;
    const int through = before + inclusive_scan(batches, lane);
    const u32 beyond = __ballot_sync(0xffffffffu, batch < through);
    if (beyond) {
      const int source = __ffs(beyond) - 1;
      const auto of_source = [&](int x) { return __shfl_sync(0xffffffffu, x, source); };
      const SplitRow found = {of_source(row.row), of_source(row.first), of_source(row.count), 0};
      return {found, batch - of_source(through - batches)};
    }
    before = __shfl_sync(0xffffffffu, through, kWarp - 1);
  }
  return {{0, 0, 0, 0}, 0};
}

HELIX_DEVICE bool is_split(const Splits& splits, int count, int row) {
  bool found = false;
  for (int i = int(threadIdx.x) % kWarp; i < count; i += kWarp) found |= splits.rows[i].row == row;
  return __any_sync(0xffffffffu, found);
}

template <class C> struct WarpSums {
  static constexpr int kWarps = PieceMerge<C>::kWarps;
  float values[kWarps][kPieceColumns], tops[kWarps], totals[kWarps];
};

// Of the block's warps; those below kPieceLanes get it, and only they may use it. Called by the whole block.
template <class C> HELIX_DEVICE void merge_over_warps(Merged& sum, WarpSums<C>& shared) {
  constexpr int kWarps = PieceMerge<C>::kWarps;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (lane < kPieceLanes) {
    shared.tops[warp] = sum.top, shared.totals[warp] = sum.total;
#pragma unroll
    for (int c = 0; c < 8; ++c) shared.values[warp][c * kPieceLanes + lane] = sum.values[c];
  }
  __syncthreads();
  if (int(threadIdx.x) < kPieceLanes) {
    for (int w = 1; w < kWarps; ++w) sum.top = fmaxf(sum.top, shared.tops[w]);
    sum.total = 0.0f;
    for (int c = 0; c < 8; ++c) sum.values[c] = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      const float weight = __expf(shared.tops[w] - finite<C>(sum.top));
      sum.total += weight * shared.totals[w];
#pragma unroll
      for (int c = 0; c < 8; ++c) sum.values[c] += weight * shared.values[w][c * kPieceLanes + lane];
    }
  }
  __syncthreads();  // before the next batch's sums
}

// A piece of a head to the rank that keeps the head. `query`: of the row, tokens of all heads.
template <class C>
HELIX_DEVICE void send_piece(const Group& group, const ExchangeInbox<C>& inbox, const Merged& sum, int row, int query,
                             int piece) {
  constexpr int kHeads = C::members * C::heads;
  const int lane = int(threadIdx.x) % kWarp, head = query % kHeads, member = head / C::heads;
  const i64 token = i64(row) * C::row_tokens + query / kHeads, unit = token * C::heads + head % C::heads;
  const float lse = sum.top + logf(sum.total), inverse = divisor<C>(sum.total);
  u8* to = group.inbox(member);
  if (!is_minus_infinity(lse)) {
    Vector16 packed;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      packed.words[c] = pack_bfloat16(sum.values[2 * c] / inverse, sum.values[2 * c + 1] / inverse);
    store_to_peer(inbox.o(to, group.rank, unit) + piece * kPieceLanes + lane, sendable(packed));
  }
  if (lane == 0) store_to_peer(inbox.lse(to, group.rank, unit) + piece, sendable(u32(__float_as_int(lse))));
}

template <class C>
HELIX_DEVICE void merge_and_send(const Splits& splits, const Group& group, int max_rows, int mergers) {
  using Batch = PieceMerge<C>;
  __shared__ WarpSums<C> shared;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, count = *splits.count;
  Dealt dealt = deal_batch<C>(splits, count, int(blockIdx.x));
  if (dealt.row.count == 0) return;  // the first batch is the block's only one, if there are enough blocks
  wait_for_previous_kernels();
  let_next_kernel_start();
  const ExchangeInbox<C> inbox(group, max_rows);
  for (int batch = int(blockIdx.x); dealt.row.count > 0; dealt = deal_batch<C>(splits, count, batch += mergers)) {
    const bool many = Batch::many(dealt.row.count);
    const int item = many ? dealt.batch : dealt.batch * Batch::kWarps + warp;
    const int query = item / C::pieces, piece = item % C::pieces;
    const int column = piece * kPieceColumns + lane % kPieceLanes * 8;
    const int slot = (many ? warp * Batch::kSlots : 0) + lane / kPieceLanes;
    const int slots = many ? Batch::kSlots * Batch::kWarps : Batch::kSlots;
    Merged sum = merge_strip<C, C::batch>(splits.part_o, splits.part_lse, dealt.row, query, column, slot, slots);
    merge_over_lanes<kPieceLanes>(sum);
    if (many) merge_over_warps<C>(sum, shared);
    if (lane < kPieceLanes && (warp == 0 || !many)) send_piece<C>(group, inbox, sum, dealt.row.row, query, piece);
  }
}

template <class C>
HELIX_DEVICE void merge_exchange(typename C::Element* o_out, const typename C::Element* o, const float* lse,
                                 const Splits& splits, const Group& group, int rows, int max_rows, int mergers) {
  if (int(blockIdx.x) < mergers) return merge_and_send<C>(splits, group, max_rows, mergers);
  const i64 unit = i64(int(blockIdx.x) - mergers) * (C::threads / kWarp) + threadIdx.x / kWarp;
  const bool whole = !is_split(splits, *splits.count, int(unit / (C::heads * C::row_tokens)));
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (unit >= i64(rows) * C::heads) return;
  exchange_head<C>(o_out, o, lse, group, ExchangeInbox<C>(group, max_rows), unit, whole);
}

}  // namespace helix
