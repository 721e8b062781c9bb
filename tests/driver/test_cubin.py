"""LoadedKernel.launch against what a C program and cuda-bindings make of the same launch."""

from __future__ import annotations

import ctypes
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from helixc_runtime import cubin
from helixc_runtime.cubin import CubinError
from tests.driver.stub import FUNCTION, Driver

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
pytest.importorskip("cuda.bindings")

KINDS = ("map", "map", "pointer", "int32", "int32", "int32", "pointer", "pointer", "int32")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


@pytest.fixture
def pick() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


def kernel(
    folder: Path, driver: Driver, kinds: tuple[str, ...], threads: int = 128, device: str = "cuda:0", **options: Any
) -> cubin.LoadedKernel:
    (folder / "kernel.cubin").write_bytes(b"any")
    driver.takes(kinds)
    return cubin.LoadedKernel(folder / "kernel.cubin", "a_kernel", kinds, threads, torch.device(device), **options)


def random_values(kinds: tuple[str, ...], pick: random.Random) -> list[Any]:
    made: dict[str, Any] = {
        "pointer": lambda: pick.randrange(1 << 64),
        "int32": lambda: pick.randrange(-(1 << 31), 1 << 31),
        "map": lambda: (ctypes.c_uint8 * 128)(*pick.randbytes(128)),
    }
    return [made[kind]() for kind in kinds]


def as_bytes(kind: str, value: Any) -> bytes:
    return bytes(value) if kind == "map" else struct.pack({"pointer": "=Q", "int32": "=i"}[kind], value)


@pytest.mark.parametrize("early", [False, True])
def test_every_field_arrives_where_a_c_program_reads_it(
    early: bool, driver: Driver, pick: random.Random, tmp_path: Path
) -> None:
    threads, shared = 32 * pick.randint(1, 32), pick.randint(1, 200_000)
    loaded = kernel(tmp_path, driver, KINDS, threads, shared=shared, early=early)
    for launch in range(3):  # later launches must not see the earlier ones' values
        grid = (pick.randrange(1, 1 << 31), pick.randrange(1, 1 << 16), pick.randrange(1, 1 << 16))
        values = random_values(KINDS, pick)
        driver.streams[0] = pick.randrange(1 << 47)
        loaded.launch(grid, *values)
        seen = driver.record
        assert driver.launches == launch + 1
        assert (tuple(seen.grid), tuple(seen.block), seen.shared_bytes) == (grid, (threads, 1, 1), shared)
        assert (seen.stream or 0, seen.function, seen.extra) == (driver.streams[0], FUNCTION, None)
        assert seen.attribute_count == int(early)
        if early:
            from cuda.bindings.driver import CUlaunchAttributeID

            name = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            assert (seen.attribute_id, seen.attribute_value) == (int(name), 1)
        for index, (kind, value) in enumerate(zip(KINDS, values, strict=True)):
            assert driver.argument(index, kind) == as_bytes(kind, value), f"argument {index}, a {kind}"


@pytest.mark.parametrize("early", [False, True])
def test_the_configuration_is_that_of_cuda_bindings(early: bool, pick: random.Random) -> None:
    from cuda.bindings import driver

    sizes = [pick.randrange(1, 1 << 16) for _ in range(5)]
    stream = pick.randrange(1 << 47)
    ours = cubin._launch_config(sizes[3], sizes[4], early)
    ours.grid_x, ours.grid_y, ours.grid_z = sizes[:3]
    ours.stream = stream
    theirs = driver.CUlaunchConfig()
    theirs.gridDimX, theirs.gridDimY, theirs.gridDimZ = sizes[:3]
    theirs.blockDimX, theirs.blockDimY, theirs.blockDimZ = sizes[3], 1, 1
    theirs.sharedMemBytes, theirs.hStream = sizes[4], driver.CUstream(stream)
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    theirs.attrs = [attribute] if early else []
    theirs.numAttrs = int(early)
    sizes_of = ctypes.sizeof(cubin._LaunchConfig), ctypes.sizeof(cubin._LaunchAttribute)
    assert sizes_of == (56, 72)  # cuda.h of CUDA 12 and 13, 64-bit
    at = cubin._LaunchConfig.attributes.offset
    mine, bindings = (ctypes.string_at(address, 56) for address in (ctypes.addressof(ours), theirs.getPtr()))
    assert mine[:at] + mine[at + 8 : 52] == bindings[:at] + bindings[at + 8 : 52]  # the last 4 bytes are padding
    pointers = [int.from_bytes(text[at : at + 8], "little") for text in (mine, bindings)]
    if early:
        written = [ctypes.string_at(pointer, 72) for pointer in pointers]
        assert written[0] == written[1]
    else:
        assert pointers[0] == 0


def test_a_kernel_without_arguments(driver: Driver, tmp_path: Path) -> None:
    kernel(tmp_path, driver, ()).launch((3, 1, 1))
    assert driver.launches == 1 and tuple(driver.record.grid) == (3, 1, 1)


def test_how_a_multiprocessors_memory_is_divided(driver: Driver, tmp_path: Path) -> None:
    """Much L1 where little is shared, counting static and dynamic; much dynamic shared memory is asked for."""
    from cuda.bindings.driver import CUfunction_attribute

    attributes = CUfunction_attribute
    divided = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    dynamic = (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 48 * 1024 + 16)
    for static, shared, wanted in (
        (21 * 1024, 0, [(divided, 28)]),
        (21 * 1024, 10 * 1024, [(divided, 28)]),
        (37 * 1024, 0, [(divided, 100)]),
        (21 * 1024, 11 * 1024, [(divided, 100)]),
        (0, 48 * 1024 + 16, [(divided, 100), dynamic]),
    ):
        driver.static_shared = static
        driver.attributes.clear()
        kernel(tmp_path, driver, ("pointer",), shared=shared)
        assert [of[1:] for of in driver.attributes] == wanted


def test_two_gpus_in_one_process(driver: Driver, tmp_path: Path) -> None:
    """Each launch runs in its own GPU's context and on its current stream, and the caller's GPU stays the current."""
    kernels = [kernel(tmp_path, driver, ("int32",), device=f"cuda:{index}") for index in (0, 1)]
    for current in (0, 1):
        with torch.cuda.device(current):
            for index in (1, 0, 1):
                kernels[index].launch((1, 1, 1), 5)
                assert (driver.record.device, driver.record.stream) == (index, driver.streams[index])
                assert torch.cuda.current_device() == current


def test_a_refused_launch_names_kernel_grid_and_error(driver: Driver, tmp_path: Path) -> None:
    loaded = kernel(tmp_path, driver, ("int32",))
    driver.answers(701)
    with pytest.raises(
        CubinError, match=r"launching a_kernel with grid \(7, 1, 2\): .* CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
    ):
        loaded.launch((7, 1, 2), 5)
    driver.answers(0)
    loaded.launch((7, 1, 2), 5)


def test_a_value_that_does_not_fit_is_no_launch(driver: Driver, tmp_path: Path) -> None:
    loaded = kernel(tmp_path, driver, ("pointer", "int32"))
    for values in ((0, 1 << 31), (-1, 0), (1 << 64, 0)):
        with pytest.raises(struct.error):
            loaded.launch((1, 1, 1), *values)
    for values in ((), (1,), (1, 2, 3)):
        with pytest.raises(AssertionError, match="a_kernel takes 2 arguments"):
            loaded.launch((1, 1, 1), *values)
    assert driver.launches == 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('("block_x", ctypes.c_uint32)', '("block_x", ctypes.c_uint64)'),
        ('("stream", ctypes.c_void_p),\n        ("attributes"', '("attributes"'),
        ("attribute.value[0] = 1", "attribute.value[1] = 1"),
        ("config.attribute_count = 1", "pass"),
        ("_SHARED_PERCENT, _ALL_SHARED = 28, 100", "_SHARED_PERCENT, _ALL_SHARED = 100, 28"),
        ("_PROGRAMMATIC_STREAM_SERIALIZATION = 6", "_PROGRAMMATIC_STREAM_SERIALIZATION = 7"),
        ("start + end - struct.calcsize(kind)", "start + end"),
        ("ctypes.addressof(values[i])", "ctypes.addressof(values[0])"),
        ("config.stream = self._stream_of(self._device)", "config.stream = self._stream_of(0)"),
        ("if torch.cuda.current_device() == self._device:", "if True:"),
    ],
)
def test_a_planted_bug_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pick: random.Random
) -> None:
    source = Path(cubin.__file__).read_text()
    assert source.count(right) == 1
    changed: dict[str, Any] = {"__name__": "changed"}
    exec(compile(source.replace(right, wrong), "changed", "exec"), changed)
    for name in ("LoadedKernel", "_launch_config", "_LaunchConfig", "_LaunchAttribute"):
        monkeypatch.setattr(cubin, name, changed[name])
    stub = Driver(tmp_path, monkeypatch)
    changed["_driver_library"] = cubin._driver_library
    with pytest.raises(AssertionError):
        for early in (False, True):  # the layout first: a driver that reads a wrong one crashes
            test_the_configuration_is_that_of_cuda_bindings(early, pick)
        for early in (False, True):
            stub.restart()
            test_every_field_arrives_where_a_c_program_reads_it(early, stub, pick, tmp_path)
        test_two_gpus_in_one_process(stub, tmp_path)
        stub.attributes.clear()
        test_how_a_multiprocessors_memory_is_divided(stub, tmp_path)
