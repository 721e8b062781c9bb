// Routing: which experts each token goes to, from its router logits, as models/layers.py's route.
//
// A warp a token: lane l holds experts l, l + 32, ... in registers. The best is found by two reductions over the warp,
// of the scores' bits in an order that compares as unsigned integers, then of the expert's number: of equal scores the
// lower expert wins. All of it takes a few hundred cycles, so every thread block that needs the routing computes it.
#pragma once
#include "helix/ordered.cuh"
#include "helix/warp.cuh"

namespace helix {

// The largest of the warp's keys, and which expert has it. Lane l's key i is that of expert 32 * i + l.
template <int count> HELIX_DEVICE void best(const u32 (&keys)[count], u32& key, int& expert) {
  const int lane = int(threadIdx.x) % kWarp;
  u32 mine = keys[0];
  int at = 0;
#pragma unroll
  for (int i = 1; i < count; ++i)
    if (keys[i] > mine) mine = keys[i], at = i;
  key = __reduce_max_sync(0xffffffffu, mine);
  expert = int(__reduce_min_sync(0xffffffffu, mine == key ? u32(at * kWarp + lane) : 0xffffffffu));
}

template <int count> HELIX_DEVICE void take(u32 (&keys)[count], int expert) {
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (i * kWarp + int(threadIdx.x) % kWarp == expert) keys[i] = kTaken;
}

// Scores of one token: sigmoid, or softmax over all experts.
template <class C, int count> HELIX_DEVICE void score(float (&x)[count]) {
  const int lane = int(threadIdx.x) % kWarp;
  if constexpr (C::sigmoid) {
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = 1.0f / (1.0f + expf(-x[i]));
  } else {
    float largest = minus_infinity(), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i * kWarp + lane < C::experts) largest = fmaxf(largest, x[i]);
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      x[i] = i * kWarp + lane < C::experts ? expf(x[i] - largest) : 0.0f;
      sum += x[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] /= sum;
  }
}

// Keeps the keys of the best groups of consecutive experts, ranked by their best expert or by the sum of the best two.
// The others become minus infinity's, as in the model: they are chosen after all of these.
template <class C, int count> HELIX_DEVICE void limit_groups(u32 (&keys)[count]) {
  constexpr int size = C::experts / C::groups;
  const int lane = int(threadIdx.x) % kWarp;
  float rank[C::groups];
#pragma unroll
  for (int group = 0; group < C::groups; ++group) {
    u32 own[count], key;
    int expert;
#pragma unroll
    for (int i = 0; i < count; ++i) own[i] = (i * kWarp + lane) / size == group ? keys[i] : kTaken;
    best(own, key, expert);
    rank[group] = score_of(key);
    if constexpr (C::top2_sum) {
      take(own, expert);
      best(own, key, expert);
      rank[group] += score_of(key);
    }
  }
  const u32 last = ordered(minus_infinity());
#pragma unroll
  for (int group = 0; group < C::groups; ++group) {
    int better = 0;
#pragma unroll
    for (int other = 0; other < C::groups; ++other)
      better += other < group ? ordered(rank[other]) >= ordered(rank[group]) : ordered(rank[other]) > ordered(rank[group]);
    if (better < C::top_groups) continue;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if ((i * kWarp + lane) / size == group && keys[i] != kTaken) keys[i] = last;
  }
}

// One token's experts and their factors, by one warp. logits and bias (null: none) are [experts].
template <class C>
HELIX_DEVICE void route(int (&experts)[C::top_k], float (&factors)[C::top_k], const float* logits, const float* bias) {
  constexpr int count = (C::experts + kWarp - 1) / kWarp;
  static_assert(C::top_k <= kWarp && C::top_k <= C::experts, "a lane for each chosen expert");
  const int lane = int(threadIdx.x) % kWarp;
  float scores[count];
  u32 keys[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int expert = i * kWarp + lane;
    scores[i] = expert < C::experts ? logits[expert] : 0.0f;
  }
  score<C>(scores);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int expert = i * kWarp + lane;
    keys[i] = expert < C::experts ? ordered(bias ? scores[i] + bias[expert] : scores[i]) : kTaken;
  }
  if constexpr (C::groups > 1) limit_groups<C>(keys);
  int chosen = 0;       // lane j: the j-th choice
  float factor = 0.0f;  // its score, without the bias
#pragma unroll
  for (int j = 0; j < C::top_k; ++j) {
    u32 key;
    int expert;
    best(keys, key, expert);
    take(keys, expert);
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i == expert / kWarp) own = scores[i];
    own = __shfl_sync(0xffffffffu, own, expert % kWarp);
    if (lane == j) chosen = expert, factor = own;
  }
  if constexpr (C::normalize) factor /= warp_sum(factor) + 1e-20f;
  factor *= C::scale;
  if (lane < C::top_k) {
    experts[lane] = chosen;
    factors[lane] = factor;
  }
}

// Whom this rank's experts serve, for all tokens of the launch.
template <class C> struct Routing {
  static constexpr int kTokens = C::eights * 8, kNone = 255;
  int experts[kTokens][C::top_k];
  float factors[kTokens][C::top_k];
  u8 slots[C::local_experts][kTokens];  // which of a token's choices this expert is, kNone: none
  int active[C::local_experts];         // experts of this rank, from 0, that some token chose; ascending
  u32 bits[(C::local_experts + kWarp - 1) / kWarp];
  int count;

  // By all threads of the block; logits [tokens, C::experts], `first` is the number of this rank's first expert.
  HELIX_DEVICE void make(const float* logits, const float* bias, int tokens, int first) {
    const int thread = int(threadIdx.x), lane = thread % kWarp;
    for (int token = thread / kWarp; token < tokens; token += C::threads / kWarp)
      route<C>(experts[token], factors[token], logits + i64(token) * C::experts, bias);
    __syncthreads();
    constexpr int padded = (C::local_experts + kWarp - 1) / kWarp * kWarp;
    for (int expert = thread; expert < padded; expert += C::threads) {
      const u32 found = __ballot_sync(0xffffffffu, expert < C::local_experts && find(expert, first + expert, tokens));
      if (lane == 0) bits[expert / kWarp] = found;
    }
    __syncthreads();
    for (int expert = thread; expert < C::local_experts; expert += C::threads) {
      const int word = expert / kWarp;
      int before = __popc(bits[word] & ((1u << lane) - 1));
      for (int i = 0; i < word; ++i) before += __popc(bits[i]);
      if (bits[word] >> lane & 1) active[before] = expert;
      if (expert == C::local_experts - 1) count = before + int(bits[word] >> lane & 1);
    }
    __syncthreads();
  }

  // Fills the slots of one of this rank's experts; whether any token chose it.
  HELIX_DEVICE bool find(int expert, int number, int tokens) {
    bool any = false;
    for (int token = 0; token < tokens; ++token) {
      int slot = kNone;
#pragma unroll
      for (int j = 0; j < C::top_k; ++j)
        if (experts[token][j] == number) slot = j;
      slots[expert][token] = u8(slot);
      any |= slot != kNone;
    }
    return any;
  }
};

}  // namespace helix
