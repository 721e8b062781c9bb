// The instructions of templates/include/helix/wgmma.cuh for a CPU.
#pragma once
#include "helix/mma.cuh"

namespace helix {

HELIX_DEVICE void wgmma_m64n32k16(float (&d)[16], u64 a, u64 b, int accumulate) {
  simt::wgmma({d, 32, simt::Element::bfloat16, accumulate != 0, false, false, nullptr, a, b});
}

HELIX_DEVICE void wgmma_m64n64k16(float (&d)[32], u64 a, u64 b, int accumulate) {
  simt::wgmma({d, 64, simt::Element::bfloat16, accumulate != 0, false, false, nullptr, a, b});
}

HELIX_DEVICE void wgmma_m64n64k16(float (&d)[32], const FragmentA& a, u64 b, int accumulate) {
  simt::wgmma({d, 64, simt::Element::bfloat16, accumulate != 0, false, false, a.x, 0, b});
}

HELIX_DEVICE void wgmma_m64n128k16(float (&d)[64], u64 a, u64 b, int accumulate) {
  simt::wgmma({d, 128, simt::Element::bfloat16, accumulate != 0, false, true, nullptr, a, b});
}

template <int kSums> HELIX_DEVICE void wgmma_m64k16_float16(float (&d)[kSums], const FragmentA& a, u64 b, int accumulate) {
  simt::wgmma({d, kSums * 2, simt::Element::float16, accumulate != 0, false, false, a.x, 0, b});
}

HELIX_DEVICE void wgmma_keep(const FragmentA&) {}

}  // namespace helix
