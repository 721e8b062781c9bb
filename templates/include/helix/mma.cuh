// Tensor-core fragments of one warp: m16n8k16 products of bfloat16 or float16 with float32 sums, how to load them from
// shared memory, and FP8 e4m3 to float16, which is exact.
#pragma once
#include "helix/sm90.cuh"

namespace helix {

struct FragmentA { u32 x[4]; };  // 16 x 16
struct FragmentB { u32 x[2]; };  // 16 x 8

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
HELIX_DEVICE FragmentA load_matrices(u32 address) {
  FragmentA a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 { %0, %1, %2, %3 }, [%4];"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3]) : "r"(address) : "memory");
  return a;
}

// The same, each matrix transposed.
HELIX_DEVICE FragmentA load_matrices_transposed(u32 address) {
  FragmentA a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 { %0, %1, %2, %3 }, [%4];"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3]) : "r"(address) : "memory");
  return a;
}

// Four 8x8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
HELIX_DEVICE void store_matrices(u32 address, const FragmentA& a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], { %1, %2, %3, %4 };" ::"r"(address), "r"(a.x[0]),
               "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3])
               : "memory");
}

// The same, each matrix transposed.
HELIX_DEVICE void store_matrices_transposed(u32 address, const FragmentA& a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], { %1, %2, %3, %4 };" ::"r"(address), "r"(a.x[0]),
               "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3])
               : "memory");
}

// An 8x8 matrix of 16-bit elements held by the warp, transposed.
HELIX_DEVICE u32 transpose(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a * b. Lane l holds of c: rows l / 4 (x[0], x[1]) and l / 4 + 8 (x[2], x[3]), columns l % 4 * 2 + {0, 1}.
HELIX_DEVICE void multiply_add(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %0, %1, %2, %3 }, { %4, %5, %6, %7 }, { %8, %9 },"
      " { %0, %1, %2, %3 };"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

// The same of float16.
HELIX_DEVICE void multiply_add_float16(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %0, %1, %2, %3 }, { %4, %5, %6, %7 }, { %8, %9 },"
      " { %0, %1, %2, %3 };"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

HELIX_DEVICE u32 pack_float16(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Bytes 0 and 1 (`low`), or 2 and 3, of FP8 e4m3 to two float16.
HELIX_DEVICE u32 e4m3_low_to_float16(u32 x) {
  u32 pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(pair) : "r"(x));
  return pair;
}
HELIX_DEVICE u32 e4m3_high_to_float16(u32 x) {
  u32 pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }" : "=r"(pair) : "r"(x));
  return pair;
}

// Bytes 0, 2, 1, 3.
HELIX_DEVICE u32 swap_middle_bytes(u32 x) { return __byte_perm(x, 0, 0x3120); }

}  // namespace helix
