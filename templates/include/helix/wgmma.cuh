// Hopper's warpgroup matrix instructions (float32 sums), as many shapes as the kernels use.
#pragma once
#include "helix/mma.cuh"

namespace helix {

// Inline assembly numbers its operands from the sums on, and takes neither arrays nor loops.
#define HELIX_SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HELIX_SUMS_16 HELIX_SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HELIX_SUMS_32 \
  HELIX_SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HELIX_SUMS_64                                                                              \
  HELIX_SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
                ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HELIX_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HELIX_8(i) HELIX_4(i), HELIX_4(i + 4)
#define HELIX_16(i) HELIX_8(i), HELIX_8(i + 8)
#define HELIX_32(i) HELIX_16(i), HELIX_16(i + 16)
#define HELIX_64(i) HELIX_32(i), HELIX_32(i + 32)

// a and b in shared memory; their places and p behind the `sums`. b_by_n: b has n contiguous, else k.
#define HELIX_WGMMA(sums, shape, at_a, at_b, at_p, b_by_n)                                      \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " at_p ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" HELIX_SUMS_##sums "}, " \
               at_a ", " at_b ", p, 1, 1, 0, " b_by_n "; }\n"                                   \
               : HELIX_##sums(0)                                                                \
               : "l"(a), "l"(b), "r"(accumulate))

// a in registers, b in shared memory with k contiguous.
#define HELIX_WGMMA_REGISTERS(sums, shape, type, at_a, at_b, at_p)                                       \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " at_p ", 0;\n"                                           \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" HELIX_SUMS_##sums "}, {" \
               at_a "}, " at_b ", p, 1, 1, 0; }\n"                                                       \
               : HELIX_##sums(0)                                                                         \
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"(accumulate))

// d[64][n] += a[64][16] b[16][n] of bfloat16, both in shared memory: b with k contiguous, at n 128 with n contiguous.
HELIX_DEVICE void wgmma_m64n32k16(float (&d)[16], u64 a, u64 b, int accumulate) {
  HELIX_WGMMA(16, "m64n32k16", "%16", "%17", "%18", "0");
}
HELIX_DEVICE void wgmma_m64n64k16(float (&d)[32], u64 a, u64 b, int accumulate) {
  HELIX_WGMMA(32, "m64n64k16", "%32", "%33", "%34", "0");
}
HELIX_DEVICE void wgmma_m64n128k16(float (&d)[64], u64 a, u64 b, int accumulate) {
  HELIX_WGMMA(64, "m64n128k16", "%64", "%65", "%66", "1");
}

// The same, a in registers.
HELIX_DEVICE void wgmma_m64n64k16(float (&d)[32], const FragmentA& a, u64 b, int accumulate) {
  HELIX_WGMMA_REGISTERS(32, "m64n64k16", "bf16", "%32, %33, %34, %35", "%36", "%37");
}

// And of float16, n 16, 32 and 64.
HELIX_DEVICE void wgmma_m64k16_float16(float (&d)[8], const FragmentA& a, u64 b, int accumulate) {
  HELIX_WGMMA_REGISTERS(8, "m64n16k16", "f16", "%8, %9, %10, %11", "%12", "%13");
}
HELIX_DEVICE void wgmma_m64k16_float16(float (&d)[16], const FragmentA& a, u64 b, int accumulate) {
  HELIX_WGMMA_REGISTERS(16, "m64n32k16", "f16", "%16, %17, %18, %19", "%20", "%21");
}
HELIX_DEVICE void wgmma_m64k16_float16(float (&d)[32], const FragmentA& a, u64 b, int accumulate) {
  HELIX_WGMMA_REGISTERS(32, "m64n64k16", "f16", "%32, %33, %34, %35", "%36", "%37");
}

#undef HELIX_WGMMA
#undef HELIX_WGMMA_REGISTERS

// Registers that wgmma still reads: not to be used otherwise before this.
HELIX_DEVICE void wgmma_keep(const FragmentA& a) {
  asm volatile("" ::"r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]));
}

}  // namespace helix
