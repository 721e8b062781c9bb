// Exchange: every cp rank's partial of all heads becomes the merged attention of each rank's own heads, in one launch.
//
//   o [rows, N * H, P], lse [rows, N * H] of this rank's KV  ->  o_out [rows, H, P] over all N ranks' KV
//
// Head n * H + j goes to member n, as its head j. An inbox holds [2 halves][N senders][max_rows][H][P] of O, then
// [2][N][max_rows][H] LSE in float32. The merge is combine.cuh's: weights exp(lse - max lse), in float32, over the
// members in their order; parts without tokens (lse = -inf) are neither sent nor read, but for their LSE.
//
// One warp a (row, own head): it sends the heads that the same warp on every other GPU waits for, then waits for what
// those send. So no thread block waits for another one of its own GPU, and any grid makes progress.
// Roofline: NVLink, rows * (N - 1) * H * (P * size + 4) bytes out and in; at few rows the way there and back, some 4 us.
#pragma once
#include "helix/inbox.cuh"
#include "helix/warp.cuh"

namespace helix {

template <class C> struct ExchangeInbox {
  using Element = typename C::Element;
  static constexpr int kVectors = C::partial_dim * int(sizeof(Element)) / 16;  // of one head's O
  i64 units;     // max_rows * H
  u32 half;

  HELIX_DEVICE ExchangeInbox(const Group& group, int max_rows)
      : units(i64(max_rows) * C::heads), half(group.half()) {}
  HELIX_DEVICE i64 place(int sender, i64 unit) const { return (i64(half) * C::members + sender) * units + unit; }
  HELIX_DEVICE Vector16* o(u8* inbox, int sender, i64 unit) const {
    return reinterpret_cast<Vector16*>(inbox) + place(sender, unit) * kVectors;
  }
  HELIX_DEVICE u32* lse(u8* inbox, int sender, i64 unit) const {
    u8* after = inbox + 2 * i64(C::members) * units * kVectors * 16;
    return reinterpret_cast<u32*>(after) + place(sender, unit);
  }
};

// sum += weight * the elements of v.
template <class Element, int n> HELIX_DEVICE void add_weighted(float (&sum)[n], const Vector16& v, float weight) {
  static_assert(n * int(sizeof(Element)) == 16, "one vector");
  const Element* elements = reinterpret_cast<const Element*>(v.words);
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] += weight * to_float(elements[i]);
}

template <class C>
HELIX_DEVICE void exchange(typename C::Element* o_out, const typename C::Element* o, const float* lse,
                           const Group& group, int rows, int max_rows) {
  using Element = typename C::Element;
  using Inbox = ExchangeInbox<C>;
  constexpr int vectors = Inbox::kVectors, rounds = (vectors + kWarp - 1) / kWarp, width = 16 / int(sizeof(Element));
  const int lane = threadIdx.x % kWarp;
  const i64 unit = i64(blockIdx.x) * (C::threads / kWarp) + threadIdx.x / kWarp;
  const i64 row = unit / C::heads, head = unit % C::heads;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (row >= rows) return;
  const Inbox inbox(group, max_rows);
  const i64 first = row * C::members * C::heads + head;  // this head of member 0, among all heads

  for (int step = 1; step < C::members; ++step) {
    const int member = (group.rank + step) % C::members;
    const i64 theirs = first + i64(member) * C::heads;
    const float part_lse = lse[theirs];
    u8* to = group.inbox(member);
    if (!is_minus_infinity(part_lse)) {
      const Vector16* from = reinterpret_cast<const Vector16*>(o) + theirs * vectors;
      Vector16* place = inbox.o(to, group.rank, unit);
      for (int i = lane; i < vectors; i += kWarp) store_to_peer(place + i, sendable(from[i]));
    }
    if (lane == 0) store_to_peer(inbox.lse(to, group.rank, unit), sendable(u32(__float_as_int(part_lse))));
  }

  u8* own = group.inbox(group.rank);
  float part_lse[C::members], largest = minus_infinity(), total = 0.0f;
#pragma unroll
  for (int member = 0; member < C::members; ++member) {
    part_lse[member] = member == group.rank
                           ? lse[first + i64(member) * C::heads]
                           : __int_as_float(int(receive(inbox.lse(own, member, unit), group, member)));
    largest = fmaxf(largest, part_lse[member]);
  }
  __syncwarp();  // all lanes have read the LSEs
  float merged[rounds][width] = {};
#pragma unroll
  for (int member = 0; member < C::members; ++member) {
    const bool mine = member == group.rank;
    if (!mine && lane == 0) forget(inbox.lse(own, member, unit));
    if (is_minus_infinity(part_lse[member])) continue;
    const float weight = expf(part_lse[member] - largest);
    total += weight;
    const Vector16* local = reinterpret_cast<const Vector16*>(o) + (first + i64(member) * C::heads) * vectors;
    Vector16* place = inbox.o(own, member, unit);
#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      const int i = round * kWarp + lane;
      if (i >= vectors) continue;
      const Vector16 v = mine ? local[i] : receive(place + i, group, member);
      if (!mine) forget(place + i);
      add_weighted<Element>(merged[round], v, weight);
    }
  }

  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  Vector16* to = reinterpret_cast<Vector16*>(o_out) + unit * vectors;
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * kWarp + lane;
    if (i >= vectors) continue;
    Vector16 v;
    Element* elements = reinterpret_cast<Element*>(v.words);
#pragma unroll
    for (int e = 0; e < width; ++e) elements[e] = from_float<Element>(merged[round][e] * scale);
    to[i] = v;
  }
}

}  // namespace helix
