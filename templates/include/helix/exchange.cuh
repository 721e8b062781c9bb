// Exchange: every cp rank's partial of all heads becomes the merged attention of each rank's own heads, in one launch.
//
//   o [rows, N * H, P], lse [rows, N * H] of this rank's KV  ->  o_out [rows, H, P] over all N ranks' KV
//
// Head n * H + j goes to member n, as its head j. An inbox holds [2 halves][N senders] messages: [max_rows][H][P] of O,
// then [max_rows][H][pieces] LSE in float32, one for each piece of a head that may come by itself (here 1, the head),
// and nothing up to the next 16 bytes.
// The merge is combine.cuh's, in float32, over the members in turn from this one on; parts without tokens (lse = -inf)
// are neither sent nor used, but for their LSE.
//
// One warp a (row, own head): it sends the heads that the same warp on every other GPU waits for, then waits for what
// those send. So no thread block waits for another one of its own GPU, and any grid makes progress.
// Roofline: NVLink, rows * (N - 1) * H * (P * size + 4) bytes out and in; at few rows the way there and back, 3 us.
#pragma once
#include "helix/inbox.cuh"
#include "helix/warp.cuh"

namespace helix {

template <class C> struct ExchangeInbox {
  using Element = typename C::Element;
  static constexpr int kVectors = C::partial_dim * int(sizeof(Element)) / 16;  // of one head's O
  i64 all_o, message;  // bytes
  u32 half;

  HELIX_DEVICE ExchangeInbox(const Group& group, int max_rows)
      : all_o(i64(max_rows) * C::heads * kVectors * 16),
        message(all_o + (i64(max_rows) * C::heads * C::pieces * 4 + 15) / 16 * 16), half(group.half()) {}
  HELIX_DEVICE u8* from(u8* inbox, int sender) const { return inbox + (i64(half) * C::members + sender) * message; }
  HELIX_DEVICE Vector16* o(u8* inbox, int sender, i64 unit) const {
    return reinterpret_cast<Vector16*>(from(inbox, sender)) + unit * kVectors;
  }
  HELIX_DEVICE u32* lse(u8* inbox, int sender, i64 unit) const {
    return reinterpret_cast<u32*>(from(inbox, sender) + all_o) + unit * C::pieces;
  }
};

// One head's O as the lanes of a warp hold it: vectors lane, lane + 32, ... of `kVectors`.
template <class C> struct Head {
  using Element = typename C::Element;
  static constexpr int kVectors = ExchangeInbox<C>::kVectors, kRounds = (kVectors + kWarp - 1) / kWarp;
  static constexpr int kWidth = 16 / int(sizeof(Element));
  Vector16 parts[kRounds];

  // visit(round, vector) for this lane's vectors.
  template <class Visit> HELIX_DEVICE static void each(Visit visit) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = round * kWarp + int(threadIdx.x) % kWarp;
      if (i < kVectors) visit(round, i);
    }
  }
  HELIX_DEVICE void load(const Vector16* from) {
    each([&](int round, int i) { parts[round] = from[i]; });
  }
};

// The weighted sum of parts as they come: weights exp(lse - max lse), rescaled when the maximum grows.
template <class C> struct Merge {
  float sum[Head<C>::kRounds][Head<C>::kWidth] = {}, largest = minus_infinity(), total = 0.0f;

  HELIX_DEVICE void add(const Head<C>& head, float lse) {
    if (is_minus_infinity(lse)) return;
    const float largest_now = fmaxf(largest, lse);
    const float before = expf(largest - largest_now), weight = expf(lse - largest_now);
    largest = largest_now;
    total = total * before + weight;
#pragma unroll
    for (int round = 0; round < Head<C>::kRounds; ++round) {
      const auto* elements = reinterpret_cast<const typename C::Element*>(head.parts[round].words);
#pragma unroll
      for (int e = 0; e < Head<C>::kWidth; ++e) {
        sum[round][e] = sum[round][e] * before + weight * to_float(elements[e]);
      }
    }
  }
  HELIX_DEVICE void store(Vector16* to) const {
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    Head<C>::each([&](int round, int i) {
      Vector16 v;
      auto* elements = reinterpret_cast<typename C::Element*>(v.words);
#pragma unroll
      for (int e = 0; e < Head<C>::kWidth; ++e) {
        elements[e] = from_float<typename C::Element>(sum[round][e] * scale);
      }
      to[i] = v;
    });
  }
};

// What `sender` sent of this rank's head: its LSE and, unless that is -inf, its O. The places are empty afterwards.
// All pieces have the same LSE.
template <class C>
HELIX_DEVICE float receive(Head<C>& head, Vector16* o, u32* lse, const Group& group, int sender) {
  const int lane = int(threadIdx.x) % kWarp;
  u32* own = lse + lane % C::pieces;
  u32 word = load_from_inbox(own);
  head.each([&](int round, int i) { head.parts[round] = load_from_inbox(o + i); });  // likely there, too
  if (!arrived(word)) word = receive(own, group, sender);
  word = __shfl_sync(0xffffffffu, word, 0);  // all lanes have read theirs
  if (lane < C::pieces) forget(own);
  const float found = __int_as_float(int(word));
  if (is_minus_infinity(found)) return found;
  head.each([&](int round, int i) {
    if (!arrived(head.parts[round])) head.parts[round] = receive(o + i, group, sender);
    forget(o + i);
  });
  return found;
}

// One head of one row, by a warp. `whole`: this rank's part is in `o` and `lse`, and goes to the others from here; else
// it comes through the inboxes, this rank's own included, from thread blocks that merge it.
template <class C>
HELIX_DEVICE void exchange_head(typename C::Element* o_out, const typename C::Element* o, const float* lse,
                                const Group& group, const ExchangeInbox<C>& inbox, i64 unit, bool whole) {
  constexpr int vectors = Head<C>::kVectors;
  const int lane = int(threadIdx.x) % kWarp;
  const i64 first = unit / C::heads * C::members * C::heads + unit % C::heads;  // this head of member 0, among all
  const auto part = [&](int member) { return first + i64(member) * C::heads; };
  const auto local = [&](int member) { return reinterpret_cast<const Vector16*>(o) + part(member) * vectors; };

  Head<C> head;
  for (int step = 1; step < C::members && whole; ++step) {
    const int member = (group.rank + step) % C::members;
    u8* to = group.inbox(member);
    const float part_lse = lse[part(member)];
    head.load(local(member));  // without waiting for the LSE; what is empty may hold anything
    if (!is_minus_infinity(part_lse)) {
      Vector16* place = inbox.o(to, group.rank, unit);
      head.each([&](int round, int i) { store_to_peer(place + i, sendable(head.parts[round])); });
    }
    if (lane < C::pieces) {
      store_to_peer(inbox.lse(to, group.rank, unit) + lane, sendable(u32(__float_as_int(part_lse))));
    }
  }

  u8* own = group.inbox(group.rank);
  Merge<C> merge;
  if (whole) {  // while the others' are on their way
    head.load(local(group.rank));
    merge.add(head, lse[part(group.rank)]);
  }
  for (int step = whole ? 1 : 0; step < C::members; ++step) {
    const int member = (group.rank + step) % C::members;
    const float part_lse = receive(head, inbox.o(own, member, unit), inbox.lse(own, member, unit), group, member);
    merge.add(head, part_lse);
  }
  merge.store(reinterpret_cast<Vector16*>(o_out) + unit * vectors);
}

template <class C>
HELIX_DEVICE void exchange(typename C::Element* o_out, const typename C::Element* o, const float* lse,
                           const Group& group, int rows, int max_rows) {
  const i64 unit = i64(blockIdx.x) * (C::threads / kWarp) + threadIdx.x / kWarp;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (unit >= i64(rows) * C::heads) return;
  exchange_head<C>(o_out, o, lse, group, ExchangeInbox<C>(group, max_rows), unit, true);
}

}  // namespace helix
