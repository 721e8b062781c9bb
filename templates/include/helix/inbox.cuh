// One-sided messages between the GPUs of a group: each writes into the others' inboxes, and waits for its own to fill.
//
// The data is its own flag. An inbox rests full of kNothing; a sender never sends that word (it is -0 where it could be
// one, and +0 is sent); a receiver polls until each word has changed, uses it, and puts kNothing back. So a message
// needs no flag, no fence and no second trip, and words may arrive in any order.
//
// An inbox has two halves, used in turn, because a fast peer may send its next message while this one is still being
// read. It cannot send the one after that: before, it must have received this rank's next message, which this rank
// sends in a later kernel than the one that reads here. So each call must send to every peer, though it be one word.
//
// Waits end. After `limit` nanoseconds without the word, or once another wait of this GPU has given up, the wait
// returns; `status` (host memory) then tells which peer, step and call, and what was computed is worthless.
#pragma once
#include "helix/peer.cuh"
#include "helix/sm90.cuh"

namespace helix {

constexpr u32 kNothing = 0x80000000;

HELIX_DEVICE u32 sendable(u32 word) { return word == kNothing ? 0 : word; }
HELIX_DEVICE Vector16 sendable(Vector16 v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v.words[i] = sendable(v.words[i]);
  return v;
}
HELIX_DEVICE bool arrived(u32 word) { return word != kNothing; }
HELIX_DEVICE bool arrived(const Vector16& v) {
  return arrived(v.words[0]) && arrived(v.words[1]) && arrived(v.words[2]) && arrived(v.words[3]);
}
HELIX_DEVICE void forget(u32* word) { *word = kNothing; }
HELIX_DEVICE void forget(Vector16* v) { *v = Vector16{{kNothing, kNothing, kNothing, kNothing}}; }

// What a wait that gave up leaves behind.
struct Status {
  u32 failed, peer, step, call;
};

// What has gone before a step: messages of the group, and steps.
struct Progress {
  u32 messages, steps;
};

// The group as one launch sees it. `inboxes`: every member's, in group order.
struct Group {
  const u64* inboxes;
  const Progress* progress;
  Status* status;
  u64 limit;  // nanoseconds
  int rank, index;  // of this rank; of this message within the step
  int call;  // what the host knows this message by

  HELIX_DEVICE u32 half() const { return (progress->messages + u32(index)) % 2; }
  HELIX_DEVICE u8* inbox(int member) const { return reinterpret_cast<u8*>(inboxes[member]); }
};

// A word or vector of this rank's inbox, once `peer` has sent it; the place is empty again afterwards.
template <class T> HELIX_DEVICE T receive(T* place, const Group& group, int peer) {
  constexpr int kPolls = 1024;  // between looks at the clock
  T value = load_from_inbox(place);
  u64 started = 0;
  for (int polls = 1; !arrived(value); ++polls) {
    if (polls % kPolls == 0) {
      const u64 now = nanoseconds();
      if (started == 0) started = now;
      volatile Status* status = group.status;
      if (status->failed) return value;
      if (now - started > group.limit) {
        status->peer = u32(peer);
        status->step = group.progress->steps;
        status->call = u32(group.call);
        store_last(&group.status->failed, 1);
        return value;
      }
    }
    value = load_from_inbox(place);
  }
  return value;
}

}  // namespace helix
