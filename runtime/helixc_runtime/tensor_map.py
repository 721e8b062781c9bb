"""Tensor maps: how the copy engine (TMA) of Hopper sees a tensor in global memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from helixc_runtime.cubin import CubinError

MAP_BYTES = 128
TensorMap = ctypes.Array[ctypes.c_uint8]


def tensor_map(tensor: Tensor, dims: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """The map of `tensor` as 2-byte elements in `dims`, innermost first, copied in boxes of `box`.

    The swizzle is as wide as the box's innermost dim, 64 or 128 bytes. `strides`: bytes between neighbours along every
    dim but the innermost. Reads outside are zeros. Raises CubinError.
    """
    from cuda.bindings import driver

    swizzles = driver.CUtensorMapSwizzle
    swizzle = {32: swizzles.CU_TENSOR_MAP_SWIZZLE_64B, 64: swizzles.CU_TENSOR_MAP_SWIZZLE_128B}[box[0]]
    error, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(dims),
        tensor.data_ptr(),
        [driver.cuuint64_t(size) for size in dims],
        [driver.cuuint64_t(size) for size in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise CubinError(f"no tensor map for {list(tensor.shape)} at {tensor.data_ptr():#x}: {error.name}")
    return _bytes_of(encoded)


def _bytes_of(encoded: Any) -> TensorMap:
    copy = (ctypes.c_uint8 * MAP_BYTES)()
    ctypes.memmove(copy, encoded.getPtr(), MAP_BYTES)
    return copy


class TensorMaps:
    """Maps of the tensors of one kind, made once for each address and shape."""

    _MOST = 4096  # forgotten beyond: queries may come at ever new addresses

    def __init__(self) -> None:
        self._made: dict[tuple[int, tuple[int, ...], tuple[int, ...]], TensorMap] = {}

    def get(self, tensor: Tensor, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorMap:
        """See tensor_map."""
        key = (tensor.data_ptr(), dims, box)
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= self._MOST:
                self._made.clear()
            made = self._made[key] = tensor_map(tensor, dims, strides, box)
        return made
