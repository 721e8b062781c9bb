// GQA partial for Hopper: attention of a row's query tokens over this rank's paged KV, read once at memory speed.
//
//   q [B * T, H, D] bf16, k and v [pages, KH, block, D] bf16, or e4m3 with scales [pages, KH, block] (quantize.py),
//   page_table [B, max_pages], lengths [B * T]: the tokens that each query token attends, rising in a row
//   ->  o [B * T, H, D] bf16, normalised by its own softmax sum, and lse [B * T, H] float32, natural log (no token: 0,
//       -inf)
//
// One thread block an SM takes an even share of all tiles, of 64 tokens in bf16 and 128 in FP8 (gqa_schedule.cuh). Its
// last warp copies K and V tiles ahead through a ring of stages. Each of its other warps takes a quarter of every tile,
// a slice, for eight queries, with its own softmax state: no warp waits for another until a unit ends. Tokens are the
// rows of the products, S^T = K Q^T and O^T += V^T P^T, so that eight queries, heads of each query token, are their
// columns and K and V come straight from shared memory (gqa_state.cuh, gqa_fp8_state.cuh). Up to 8 queries of a KV head
// take four warps and up to 16 eight, two a scheduler, whose latencies overlap; FP8 is converted by both. More queries
// are cut into shares: the blocks of neighbouring numbers take one each, of the same tokens at about the same time. Two
// blocks are a cluster if the shares come in pairs: one copies K to both, the other V, and L2 is read once. Units cut
// between blocks are merged at the end, in the same launch (gqa_merge.cuh): all blocks have to be on the GPU at once,
// which a grid of one block an SM ensures.
// NaN beyond a row's length does not spread: scores there become -inf and V rows zero. The new tokens that only later
// query tokens of the row see have weight zero in earlier ones.
// Shared memory: stages * 2 * 64 * D * 2 bytes (and FP8's scales); a unit's last stage serves to reduce the slices.
// Roofline: memory, length * 2 * D * 2 bytes a KV head and row, in FP8 length * 2 * (D + 1); L2 as often as there are
// shares, or pairs of them: 5% over one read of memory for one pair (bf16, D 128), 20% without clusters.
#pragma once
#include "helix/gqa_fp8_state.cuh"
#include "helix/gqa_state.cuh"

namespace helix {

// Copies under way at once, in tiles: half the ring, 64 KiB an SM. The memory needs a third of that to be busy, and
// what is more waits in its queues, where it delays all other traffic: queries, parts to merge, what the kernel before
// writes last. A pair of blocks copies without a limit: each copy already waits for both.
template <class C> constexpr int kMostCopies = C::cluster == 1 ? C::stages / 2 : C::stages;

// The copying warp: every tile of the share, K and V, as soon as its stage is free. `page`: of this lane's box of the
// first tiles. Only a row's last tokens are younger than the kernel before; the others' copies need not wait for it.
template <class C>
HELIX_DEVICE void copy_share(GqaShared<C>& shared, const TensorMap* k_map, const TensorMap* v_map,
                             const GqaArguments& args, GqaCursor at, int page, int lane) {
  using Tile = GqaTile<C>;
  constexpr int batch = kWarp / Tile::boxes;  // tiles whose page numbers one load of the warp gets
  u32 stage = 0, phase = 1;
  u32 oldest = 0, oldest_phase = 0;  // of the copies under way
  int copies = 0;                    // under way
  bool have_pages = true, waited = C::overlap != Overlap::old_tokens;
  do {
    const int last = at.last();
    const int* pages = args.page_table + i64(at.row) * args.max_pages;
    for (int first = at.tile; first < last; first += batch) {
      const int token = first * C::tile + lane * Tile::page_rows;  // of this lane's box
      if (!have_pages) page = token < at.length ? pages[token / C::block] : 0;
      have_pages = false;
      for (int tile = first; tile < min(first + batch, last); ++tile) {
        if (!waited && (tile + 2 >= at.tiles || phase == 0)) wait_for_previous_kernels(), waited = true;
        if (lane == 0) {
          const int boxes = min(Tile::boxes, (at.length - tile * C::tile + Tile::page_rows - 1) / Tile::page_rows);
          if (kMostCopies<C> < C::stages && ++copies > kMostCopies<C>) {
            barrier_wait(&shared.full[oldest], oldest_phase);
            if (++oldest == C::stages) oldest = 0, oldest_phase ^= 1;
            --copies;
          }
          barrier_wait(&shared.empty[stage], phase);
          barrier_expect(&shared.full[stage], u32(boxes * 2 * (Tile::box_bytes + (C::fp8 ? Tile::page_rows : 0))));
        }
#pragma unroll
        for (int box = 0; box < Tile::boxes; ++box) {
          const int box_page = __shfl_sync(0xffffffffu, page, (tile - first) * Tile::boxes + box);
          const int box_token = tile * C::tile + box * Tile::page_rows;
          if (lane == 0 && box_token < at.length) {
            const int w = box_page * C::kv_heads + at.kv_head, row = box_token % C::block / Tile::line_tokens;
            if constexpr (C::cluster == 2) {
              const int mine = int(cluster_rank());
              u8* to = shared.stage[stage][mine] + box * Tile::box_bytes;
              copy_box_to_both(to, mine == 0 ? k_map : v_map, &shared.full[stage], 0, row, 0, w);
            } else {
              copy_box(shared.stage[stage][0] + box * Tile::box_bytes, k_map, &shared.full[stage], 0, row, 0, w);
              copy_box(shared.stage[stage][1] + box * Tile::box_bytes, v_map, &shared.full[stage], 0, row, 0, w);
            }
            if constexpr (C::fp8) {
              const i64 from = i64(w) * C::block + box_token % C::block;
              const u32 to = shared_address(shared.scales.of[stage]) + box * Tile::page_rows;
              const u32 full = shared_address(&shared.full[stage]);
              copy_bulk(to, args.k_scale + from, Tile::page_rows, full, kEvictFirst);
              copy_bulk(to + C::tile, args.v_scale + from, Tile::page_rows, full, kEvictFirst);
            }
          }
        }
        if (++stage == C::stages) stage = 0, phase ^= 1;
      }
    }
  } while (at.next_unit<C>(args.lengths));
  if constexpr (C::cluster == 2) {  // a block must not leave while its peer still signals it
    for (int pending = 0; pending < C::stages; ++pending) {
      barrier_wait(shared.empty + stage, phase);
      if (++stage == C::stages) stage = 0, phase ^= 1;
    }
  }
}

// Passes a stage back, to all that copy into it, for one lane.
template <class C> HELIX_DEVICE void pass_back(u64* empty) {
  if constexpr (C::cluster == 1) barrier_arrive(empty);
  else
    for (u32 rank = 0; rank < C::cluster; ++rank) barrier_arrive_cluster(shared_address(empty), rank);
}

// The state of four columns of the block's tokens, from those of the slices.
template <class C> HELIX_DEVICE Merge merge_of_slices(GqaShared<C>& shared, u32 stage, int column, int dim) {
  constexpr int slices = GqaTile<C>::slices;
  float4 os[slices];
#pragma unroll
  for (int slice = 0; slice < slices; ++slice)
    os[slice] = *reinterpret_cast<const float4*>(shared.o(stage, slice, column, dim));
  return Merge::of<slices>(os, shared.largest[column], shared.sum[column]);
}

// Who reads the block's part of a unit.
enum class Reader { none, other_blocks, this_block };

// Merges the slices' states, and writes the unit's result if the block has seen all of it (`none`) or has the first of
// two parts and merges it with the second (`this_block`); else its own part, to `slot`, 0 or 1.
template <class C, Reader reader>
HELIX_DEVICE void finish_unit(GqaShared<C>& shared, const GqaArguments& args, const GqaCursor& at, u32 stage, int slot,
                              int thread) {
  using Tile = GqaTile<C>;
  constexpr int vectors = C::head_dim / 4;
  constexpr int items = kQueries<C> * vectors, rounds = (items + Tile::threads - 1) / Tile::threads;
  const int worker = int(worker_of_block<C>()), second = part_of_worker<C>(worker + 1, 0) * vectors;
  PartItem others[rounds];
  if constexpr (reader == Reader::this_block)  // there long ago, as a rule
#pragma unroll
    for (int round = 0; round < rounds; ++round)
      others[round].load(args.space, second + min(round * Tile::threads + thread, items - 1));
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * Tile::threads + thread;
    if (items % Tile::threads != 0 && i >= items) break;
    const int column = i / vectors, dim = i % vectors * 4;
    Merge merge = merge_of_slices<C>(shared, stage, column, dim);
    if constexpr (reader == Reader::other_blocks) {
      args.space.write<C>(part_of_worker<C>(worker, slot) + column, dim, merge);
      continue;
    }
    if constexpr (reader == Reader::this_block) {
      others[round].poll(args.space, second + i);
      args.space.clear(second + i);
      merge = Merge::of_two(merge, others[round].state());
    }
    if constexpr (kUneven<C>)
      if (!has_query<C>(column)) continue;
    const i64 query = first_group<C>(at.row, at.kv_head) * C::group + query_offset<C>(column);
    merge.template write_result<C>(args.o + query * C::head_dim + dim, dim == 0 ? args.lse + query : nullptr);
  }
}

template <class C, bool = C::fp8> struct GqaStateOf { using Type = GqaState<C>; };
template <class C> struct GqaStateOf<C, true> { using Type = GqaFp8State<C>; };

// One of the computing warps: its tokens of every tile of the share.
template <class C>
HELIX_DEVICE void attend_share(GqaShared<C>& shared, const GqaArguments& args, GqaCursor at, int warp, int lane) {
  using Tile = GqaTile<C>;
  using State = typename GqaStateOf<C>::Type;
  const int slice = warp % Tile::slices, eight = warp / Tile::slices;
  const u32 first_k = shared_address(shared.stage[0][0]) + u32(Tile::offset_of(slice));
  u32 stage = 0, phase = 0;
  int slot = 0;
  bool more;
  State state;
  do {
    const int last = at.last();
    state.start(args, at, eight, lane);
    for (int tile = at.tile;;) {
      const int valid = at.length - tile * C::tile - slice * Tile::slice_tokens;
      barrier_wait(&shared.full[stage], phase);
      if (valid > 0) {
        const u32 k = first_k + stage * (2 * Tile::matrix_bytes);
        state.attend(k, k + Tile::matrix_bytes, shared.scales.at(stage, slice), valid, lane);
      }
      if (++tile == last) break;
      pass_back<C>(&shared.empty[stage]);
      if (++stage == C::stages) stage = 0, phase ^= 1;
    }
    const bool whole = at.tile == 0 && last == at.tiles;
    named_barrier_diverged<1, Tile::threads>();  // no warp reads the last stage any more
    state.store(shared, stage, slice, eight, lane);
    named_barrier_diverged<1, Tile::threads>();
    const MergePlan& plan = shared.merge[slot];
    if (whole)
      finish_unit<C, Reader::none>(shared, args, at, stage, slot, int(threadIdx.x));
    else if (plan.count == 2 && plan.first == int(worker_of_block<C>()))
      finish_unit<C, Reader::this_block>(shared, args, at, stage, slot, int(threadIdx.x));
    else
      finish_unit<C, Reader::other_blocks>(shared, args, at, stage, slot, int(threadIdx.x));
    more = at.next_unit<C>(args.lengths);
    if (more || C::cluster == 2) {
      fence_async_proxy();
      if constexpr (C::cluster == 2) fence_cluster();  // the stage was written to, by ordinary stores
      pass_back<C>(&shared.empty[stage]);
    }
    if (++stage == C::stages) stage = 0, phase ^= 1;
    slot = 1;
  } while (more);
}

// Rows without a token: o = 0, lse = -inf.
template <class C> HELIX_DEVICE void clear_empty_rows(const GqaArguments& args, int thread, int threads) {
  constexpr int heads = C::kv_heads * C::group * C::query_tokens;  // of all query tokens
  for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
    if (row_length<C>(args.lengths, row) > 0) continue;
    u32* o = reinterpret_cast<u32*>(args.o + i64(row) * heads * C::head_dim);
    for (int i = thread; i < heads * C::head_dim / 2; i += threads) o[i] = 0;
    for (int i = thread; i < heads; i += threads) args.lse[i64(row) * heads + i] = minus_infinity();
  }
}

template <class C>
HELIX_DEVICE void gqa_partial(const TensorMap* k_map, const TensorMap* v_map, const GqaArguments& args) {
  using Tile = GqaTile<C>;
  GqaShared<C>& shared = *reinterpret_cast<GqaShared<C>*>(dynamic_shared());
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  // The schedule is older than the kernel before this one, which waited for the kernels before it in turn.
  const int* schedule = args.schedule + worker_of_block<C>() * kScheduleWords;
  if constexpr (C::overlap == Overlap::nothing) wait_for_previous_kernels();
  const BlockPlan& plan = *reinterpret_cast<const BlockPlan*>(schedule);
  const GqaCursor at(plan);
  const int page = schedule[kPlanWords + lane], empty_rows = plan.empty_rows;
  if (threadIdx.x < 2) shared.merge[threadIdx.x] = plan.merge[threadIdx.x];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::stages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], Tile::threads * C::cluster);
    }
    barrier_init_visible();
    prefetch_map(k_map);
    prefetch_map(v_map);
  }
  __syncthreads();
  if constexpr (C::cluster == 2) cluster_barrier();
  if (warp == Tile::warps) {
    if constexpr (C::overlap == Overlap::schedule) wait_for_previous_kernels();
    if (at.left > 0) copy_share<C>(shared, k_map, v_map, args, at, page, lane);
    return;
  }
  if constexpr (C::overlap != Overlap::nothing) wait_for_previous_kernels();
  let_next_kernel_start();
  if (at.left > 0) attend_share<C>(shared, args, at, warp, lane);
  merge_slices<C, Tile::threads>(args.o, args.lse, args.space, shared.merge, shared.merge_space, int(threadIdx.x));
  if (empty_rows > 0) clear_empty_rows<C>(args, int(threadIdx.x), Tile::threads);
}

}  // namespace helix
