// Reduce: the sum over a group of every rank's summand, added to the residual stream and normed, in one launch.
//
//   x [rows, D] of this rank; residual [rows, D], bias [D] and weight [D], each or none
//   ->  sum = residual + sum of all x + bias and, with a weight, normed = weight * RMSNorm(sum), both [rows, D]
//
// Each rank sends its whole summand to every other: (N - 1) * rows * D * size bytes, once over NVLink, where a ring goes
// around twice; for the few rows of a decode step that is what counts. A group of one adds and norms what it has. An
// inbox holds [2 halves][N senders][max_rows][D]. Sums are float32 in the members' order, hence the same bits on every rank; the sum is rounded
// once, and the norm is of what was rounded, itself rounded before the weight, as the published models do.
//
// One thread block a row; each thread sends the vectors that the same thread on every other GPU waits for.
// Shared memory: a word a warp. Roofline: NVLink, (N - 1) * rows * D * size bytes out and in.
#pragma once
#include "helix/inbox.cuh"
#include "helix/warp.cuh"

namespace helix {

// sum += the elements of v.
template <class Element, int n> HELIX_DEVICE void add_elements(float (&sum)[n], const Vector16& v) {
  static_assert(n * int(sizeof(Element)) == 16, "one vector");
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] += to_float(reinterpret_cast<const Element*>(v.words)[i]);
}

// Sum of `x` over the block; every thread gets it.
template <int threads> HELIX_DEVICE float block_sum(float x) {
  __shared__ float sums[threads / kWarp];
  const int warp = threadIdx.x / kWarp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) sums[warp] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < threads / kWarp; ++i) total += sums[i];
  return total;
}

template <class C>
HELIX_DEVICE void reduce(typename C::Element* sum_out, typename C::Element* normed, const typename C::Element* x,
                         const typename C::Element* residual, const typename C::Element* bias,
                         const typename C::Element* weight, const Group& group, int max_rows) {
  using Element = typename C::Element;
  constexpr int width = 16 / int(sizeof(Element)), vectors = C::hidden / width;
  constexpr int rounds = (vectors + C::threads - 1) / C::threads;
  const int thread = threadIdx.x;
  const i64 row = blockIdx.x, first = row * vectors;
  const auto vector = [](const Element* from, i64 i) { return reinterpret_cast<const Vector16*>(from)[i]; };
  const auto place = [&](int inbox, int sender) {
    const i64 half = group.half();
    return reinterpret_cast<Vector16*>(group.inbox(inbox)) + ((half * C::members + sender) * max_rows + row) * vectors;
  };
  Vector16 factors[rounds];  // weights: nobody's result
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * C::threads + thread;
    if (weight && i < vectors) factors[round] = vector(weight, i);
  }
  let_next_kernel_start();
  wait_for_previous_kernels();

  for (int step = 1; step < C::members; ++step) {
    const int member = (group.rank + step) % C::members;
    Vector16* to = place(member, group.rank);
    for (int i = thread; i < vectors; i += C::threads) store_to_peer(to + i, sendable(vector(x, first + i)));
  }

  Vector16 before[rounds];  // loaded before anything has arrived
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * C::threads + thread;
    if (residual && i < vectors) before[round] = vector(residual, first + i);
  }

  float sum[rounds][width], squares = 0.0f;
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * C::threads + thread;
    if (i >= vectors) continue;
#pragma unroll
    for (int e = 0; e < width; ++e) sum[round][e] = 0.0f;
    for (int member = 0; member < C::members; ++member) {
      Vector16 v;
      if (member == group.rank) {
        v = vector(x, first + i);
      } else {
        Vector16* from = place(group.rank, member) + i;
        v = receive(from, group, member);
        forget(from);
      }
      add_elements<Element>(sum[round], v);
    }
    if (bias) add_elements<Element>(sum[round], vector(bias, i));
    if (residual) add_elements<Element>(sum[round], before[round]);
    Vector16 out;
    Element* elements = reinterpret_cast<Element*>(out.words);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      elements[e] = from_float<Element>(sum[round][e]);
      sum[round][e] = to_float(elements[e]);
      squares += sum[round][e] * sum[round][e];
    }
    reinterpret_cast<Vector16*>(sum_out)[first + i] = out;
  }

  if (!weight) return;
  const float scale = rsqrtf(block_sum<C::threads>(squares) / float(C::hidden) + C::eps);
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * C::threads + thread;
    if (i >= vectors) continue;
    Vector16 out;
    Element* elements = reinterpret_cast<Element*>(out.words);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const float rounded = to_float(from_float<Element>(sum[round][e] * scale));
      elements[e] = from_float<Element>(to_float(reinterpret_cast<const Element*>(factors[round].words)[e]) * rounded);
    }
    reinterpret_cast<Vector16*>(normed)[first + i] = out;
  }
}

}  // namespace helix
