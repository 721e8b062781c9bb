"""HELIXC_SYNC and HELIXC_LOG_LAUNCHES, on a driver that only records."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helixc.codegen.config import configure
from helixc.codegen.problem import problems
from helixc_runtime import ops_cuda
from helixc_runtime.cubin import CubinError, LoadedKernel
from helixc_runtime.switches import Switches
from helixc_runtime.watched_kernel import WatchedKernel
from tests.driver.stub import Driver
from tests.gpu.kernel_cases import mla

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
pytest.importorskip("cuda.bindings")

KINDS = ("map", "pointer", "int32")
VALUES: tuple[Any, ...] = ((ctypes.c_uint8 * 128)(), 0x7F00_0000_1000, 12)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    stub = Driver(tmp_path, monkeypatch)
    stub.takes(KINDS)
    return stub


def kernel(folder: Path, **on: bool) -> WatchedKernel:
    (folder / "kernel.cubin").write_bytes(b"any")
    size = (96, torch.device("cuda", 1), 512)
    return WatchedKernel(Switches(**on), folder / "kernel.cubin", "a_kernel", KINDS, *size)


def test_a_launch_is_a_line(driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel(tmp_path, log_launches=True).launch((4, 2, 1), *VALUES)
    line = "launch a_kernel grid (4, 2, 1) block 96 shared 512 on cuda:1: map, 0x7f0000001000, 12\n"
    assert capsys.readouterr().err == line
    assert driver.launches == 1 and driver.argument(2, "int32") == (12).to_bytes(4, "little")


def test_the_line_comes_before_a_launch_that_fails(
    driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.answers(700)
    with pytest.raises(CubinError, match=r"launching a_kernel .* CUDA_ERROR_ILLEGAL_ADDRESS"):
        kernel(tmp_path, log_launches=True).launch((4, 2, 1), *VALUES)
    assert capsys.readouterr().err.startswith("launch a_kernel grid (4, 2, 1)")


def test_an_error_of_a_running_kernel_has_its_name(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited, capturing = [], False

    def synchronize(device: int) -> None:
        waited.append((device, driver.launches))
        if driver.launches == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    loaded = kernel(tmp_path, sync=True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    loaded.launch((1, 1, 1), *VALUES)
    with pytest.raises(CubinError, match=r"running a_kernel with grid \(9, 1, 1\): CUDA error: an illegal memory"):
        loaded.launch((9, 1, 1), *VALUES)
    assert waited == [(1, 1), (1, 2)]
    capturing = True  # nothing runs yet, and waiting would end the capture
    loaded.launch((1, 1, 1), *VALUES)
    assert len(waited) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("switch", [None, "HELIXC_SYNC", "HELIXC_LOG_LAUNCHES", "HELIXC_CHECK_NAN"])
def test_kernels_are_watched_only_when_asked_for(
    switch: str | None, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HELIXC_SYNC", "HELIXC_LOG_LAUNCHES", "HELIXC_CHECK_NAN"):
        monkeypatch.delenv(name, raising=False)
    if switch:
        monkeypatch.setenv(switch, "1")
    (tmp_path / "kernel.cubin").write_bytes(b"any")
    planned = configure(problems(mla(16, 32), 2, "sm_90a")[0]).planned()
    device = torch.device("cuda", 0)
    loaded = ops_cuda.load_kernel(dataclasses.replace(planned, cubin="kernel.cubin"), tmp_path, device)
    watched = switch in ("HELIXC_SYNC", "HELIXC_LOG_LAUNCHES")
    assert type(loaded) is (WatchedKernel if watched else LoadedKernel)
