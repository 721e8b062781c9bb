// Batch: what a decode step derives from its rows' positions: angles, lengths, who owns the new token and where it goes.
//
//   positions [N], attends [N] -> cos, sin [N, R / 2], lengths, owned and slots [N] (ops.py: DecodeBatch)
//
// Who owns a token: block-cyclic by global position over cp ranks (manifest.py: owner, local_length, local_slot). A row
// that is not in use has a negative position. One thread block a row. Roofline: one launch.
#pragma once
#include "helix/element.cuh"

namespace helix {

template <class C>
HELIX_DEVICE void make_batch(float* cosines, float* sines, int* lengths, u8* owned, i64* slots, const i64* positions,
                             const i64* attends, const int* page_table, const float* frequencies, int max_pages, int cp,
                             int cp_rank) {
  constexpr int angles = C::rope_dim / 2;
  constexpr double kTurn = 6.283185307179586;
  const i64 row = blockIdx.x, given = positions[row], position = given < 0 ? 0 : given;
  for (int i = threadIdx.x; i < angles; i += C::threads) {
    const float angle = float(position) * frequencies[i];  // rounded, as the published models do
    const double turns = angle / kTurn;
    float sine, cosine;
    sincospif(float(2 * (turns - rint(turns))), &sine, &cosine);
    cosines[row * angles + i] = cosine * C::factor;
    sines[row * angles + i] = sine * C::factor;
  }
  if (threadIdx.x) return;
  const bool attended = given >= 0 && attends[row];
  const bool mine = attended && position / C::block % cp == cp_rank;
  const i64 cycle = i64(C::block) * cp, rest = (position + 1) % cycle - i64(cp_rank) * C::block;
  const i64 last = rest < 0 ? 0 : rest < C::block ? rest : C::block;  // tokens in the block that is being filled
  lengths[row] = attended ? int((position + 1) / cycle * C::block + last) : 0;
  owned[row] = mine;
  slots[row] = mine ? i64(page_table[row * max_pages + position / cycle]) * C::block + position % C::block : 0;
}

}  // namespace helix
