// The instructions of templates/include/helix/mma.cuh for a CPU.
#pragma once
#include "helix/sm90.cuh"

namespace helix {

struct FragmentA { u32 x[4]; };
struct FragmentB { u32 x[2]; };

struct MatrixRow {
  u32 address;
  FragmentA a;
  // Element (row, column) of matrix `matrix`, whose rows the lanes gave.
  static u16 element(const simt::Lanes& lanes, u32 matrix, u32 row, u32 column) {
    const u32 address = lanes.at<MatrixRow>(matrix * 8 + row).address;
    u16 bits;
    std::memcpy(&bits, static_cast<u8*>(simt::shared(address, 16, 16)) + column * 2, 2);
    return bits;
  }
};

template <bool transposed> void complete_matrices(const simt::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) simt::fail("ldmatrix by lanes %08x only", lanes.present);
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 matrix = 0; matrix < 4; ++matrix) {
      u32 word = 0;
      for (u32 i = 0; i < 2; ++i) {
        const u32 row = lane / 4, column = lane % 4 * 2 + i;
        word |= u32(transposed ? MatrixRow::element(lanes, matrix, column, row)
                               : MatrixRow::element(lanes, matrix, row, column)) << (16 * i);
      }
      lanes.at<MatrixRow>(lane).a.x[matrix] = word;
    }
}

HELIX_DEVICE FragmentA load_matrices(u32 address) {
  MatrixRow mine = {address, {}};
  simt::meet("ldmatrix", 0xffffffffu, &mine, complete_matrices<false>);
  return mine.a;
}

HELIX_DEVICE FragmentA load_matrices_transposed(u32 address) {
  MatrixRow mine = {address, {}};
  simt::meet("ldmatrix.trans", 0xffffffffu, &mine, complete_matrices<true>);
  return mine.a;
}

// An ordinary store: of each row, by the lane that gives its address.
template <bool transposed> void scatter_matrices(const simt::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) simt::fail("stmatrix by lanes %08x only", lanes.present);
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 matrix = 0; matrix < 4; ++matrix)
      for (u32 i = 0; i < 2; ++i) {
        u32 row = lane / 4, column = lane % 4 * 2 + i;
        if (transposed) std::swap(row, column);
        const u16 bits = u16(lanes.at<MatrixRow>(lane).a.x[matrix] >> (16 * i));
        const u32 to = lanes.at<MatrixRow>(matrix * 8 + row).address;
        std::memcpy(static_cast<u8*>(simt::shared(to, 16, 16)) + column * 2, &bits, 2);
      }
}

HELIX_DEVICE void store_matrices(u32 address, const FragmentA& a) {
  MatrixRow mine = {address, a};
  simt::shared_for_store(address, 16, 16);
  simt::meet("stmatrix", 0xffffffffu, &mine, scatter_matrices<false>);
}

HELIX_DEVICE void store_matrices_transposed(u32 address, const FragmentA& a) {
  MatrixRow mine = {address, a};
  simt::shared_for_store(address, 16, 16);
  simt::meet("stmatrix.trans", 0xffffffffu, &mine, scatter_matrices<true>);
}

HELIX_DEVICE u32 transpose(u32 x) {
  struct Word { u32 x, y; } mine = {x, 0};
  simt::meet("movmatrix", 0xffffffffu, &mine, [](const simt::Lanes& lanes) {
    if (lanes.present != 0xffffffffu) simt::fail("movmatrix by lanes %08x only", lanes.present);
    for (u32 lane = 0; lane < 32; ++lane)
      for (u32 i = 0; i < 2; ++i) {
        const u32 row = lane % 4 * 2 + i, column = lane / 4;
        const u32 word = lanes.at<Word>(row * 4 + column / 2).x;
        lanes.at<Word>(lane).y |= (word >> (16 * (column % 2)) & 0xffff) << (16 * i);
      }
  });
  return mine.y;
}

struct WarpProduct {
  float* c;
  const FragmentA* a;
  const FragmentB* b;
};

template <class T> void complete_product(const simt::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) simt::fail("mma by lanes %08x only", lanes.present);
  float a[16][16], b[16][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const WarpProduct& of = lanes.at<WarpProduct>(lane);
    for (u32 i = 0; i < 2; ++i) {
      const u32 k = lane % 4 * 2 + i;
      for (u32 word = 0; word < 4; ++word)
        a[lane / 4 + word % 2 * 8][k + word / 2 * 8] = to_float(T{u16(of.a->x[word] >> (16 * i))});
      for (u32 word = 0; word < 2; ++word) b[k + word * 8][lane / 4] = to_float(T{u16(of.b->x[word] >> (16 * i))});
    }
  }
  for (u32 lane = 0; lane < 32; ++lane) {
    float* c = lanes.at<WarpProduct>(lane).c;
    for (u32 i = 0; i < 4; ++i)
      for (u32 k = 0; k < 16; ++k) c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

HELIX_DEVICE void multiply_add(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  WarpProduct mine = {c, &a, &b};
  simt::meet("mma", 0xffffffffu, &mine, complete_product<bfloat16>);
}
HELIX_DEVICE void multiply_add_float16(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  WarpProduct mine = {c, &a, &b};
  simt::meet("mma", 0xffffffffu, &mine, complete_product<float16>);
}

HELIX_DEVICE u32 pack_float16(float low, float high) {
  return float_to_float16_bits(low) | u32(float_to_float16_bits(high)) << 16;
}

HELIX_DEVICE u32 e4m3_low_to_float16(u32 x) {
  return pack_float16(float8_e4m3_bits_to_float(u8(x)), float8_e4m3_bits_to_float(u8(x >> 8)));
}
HELIX_DEVICE u32 e4m3_high_to_float16(u32 x) { return e4m3_low_to_float16(x >> 16); }

HELIX_DEVICE u32 swap_middle_bytes(u32 x) { return (x & 0xff0000ffu) | (x >> 8 & 0xff00u) | (x << 8 & 0xff0000u); }

}  // namespace helix
