// GQA schedule: what each thread block of the partial kernel does, made once a step for all layers.
//
//   lengths [B * T], page_table [B, max_pages]  ->  schedule [workers, 64] int32: a BlockPlan and the page numbers of its
//   first boxes, so that the partial kernel's first copy waits for one load only
//
// A worker is the thread blocks that read the same tokens, one for each share of a unit's queries; one here of all that
// is said of blocks. One warp a worker. Shared memory: none. Roofline: latency.
#pragma once
#include "helix/sm90.cuh"
#include "helix/work_split.cuh"

namespace helix {

// Columns of a share: some heads of the group, for each of some of the row's query tokens.
template <class C> constexpr int kQueries = C::share_heads * C::share_tokens;
// Shares of a unit, of all heads of each token first.
template <class C> constexpr int kHeadShares = C::group / C::share_heads;
template <class C> constexpr int kTokenShares = (C::query_tokens + C::share_tokens - 1) / C::share_tokens;
template <class C> constexpr int kShares = kHeadShares<C> * kTokenShares<C>;

// The block's part in merging one unit: it writes items [begin, end) (of 4 columns) from `count` parts. Of one part or
// two there are no such items (gqa_merge.cuh).
struct MergePlan {
  int row, kv_head;
  int first, count, first_is_later_slot;
  int begin, end;
  int reserved;
};

// A block's share: `count` tiles from `tile` of (row, kv_head) on.
struct BlockPlan {
  int row, kv_head, tile, tiles;  // `tiles` and `length` of the first row
  int length, count;
  int empty_rows;                 // in the whole batch
  int reserved[9];
  MergePlan merge[2];             // of the first and the last unit
};

constexpr int kPlanWords = 32, kScheduleWords = 64;
static_assert(sizeof(BlockPlan) == kPlanWords * 4, "one word a lane");

template <class C> HELIX_DEVICE MergePlan plan_merge(const Shares& shares, const Place& unit, int block) {
  constexpr int items = kQueries<C> * C::head_dim / 4;
  const Parts parts(shares, unit);
  const int mine = block - parts.first;
  const int shared = parts.count > 2 ? items : 0;
  return {unit.row, unit.kv_head, parts.first, parts.count, parts.first_is_later_slot,
          shared * mine / parts.count, shared * (mine + 1) / parts.count, 0};
}

template <class C>
HELIX_DEVICE void gqa_schedule(int* schedule, const int* lengths, const int* page_table, int rows, int max_pages) {
  constexpr int page_rows = C::block < C::tile ? C::block : C::tile;
  const int block = int(blockIdx.x), lane = int(threadIdx.x);
  wait_for_previous_kernels();
  let_next_kernel_start();
  const Shares shares(count_tiles<C>(lengths, rows, lane), int(gridDim.x));
  const int begin = shares.begin(block), end = shares.begin(block + 1);
  BlockPlan plan = {};
  for (int row = lane; row < rows; row += kWarp) plan.empty_rows += row_length<C>(lengths, row) == 0;
  plan.empty_rows = __reduce_add_sync(0xffffffffu, plan.empty_rows);
  plan.merge[0].count = plan.merge[1].count = 1;
  plan.count = end - begin;
  int page = 0;
  if (begin < end) {
    const Place first = find_place<C>(lengths, rows, begin, lane), last = find_place<C>(lengths, rows, end - 1, lane);
    plan.row = first.row, plan.kv_head = first.kv_head, plan.tile = first.tile, plan.tiles = first.tiles;
    plan.length = row_length<C>(lengths, first.row);
    plan.merge[0] = plan_merge<C>(shares, first, block);
    if (last.unit_begin != first.unit_begin) plan.merge[1] = plan_merge<C>(shares, last, block);
    const int token = first.tile * C::tile + lane * page_rows;
    if (token < plan.length) page = page_table[i64(first.row) * max_pages + token / C::block];
  }
  int* to = schedule + block * kScheduleWords;
  if (lane == 0) *reinterpret_cast<BlockPlan*>(to) = plan;
  to[kPlanWords + lane] = page;
}

}  // namespace helix
