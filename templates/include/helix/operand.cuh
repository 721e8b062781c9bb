// Descriptors of wgmma's operands in shared memory.
#pragma once
#include "helix/element.cuh"

namespace helix {

// Shared-memory operand of wgmma in 128-byte rows with the 128-byte swizzle. K contiguous: `stride` is the distance
// between 8-row groups, `lead` unused. Otherwise: `lead` between 64-column groups, `stride` between 8-row groups.
struct MatrixOperand {
  u32 low, high;
  HELIX_DEVICE MatrixOperand(u32 address, u32 lead, u32 stride)
      : low((address & 0x3ffff) >> 4 | (lead >> 4) << 16), high(stride >> 4 | 1u << 30) {}
  // The same, `bytes` on.
  HELIX_DEVICE u64 at(u32 bytes) const { return u64(high) << 32 | (low + (bytes >> 4)); }
};

}  // namespace helix
