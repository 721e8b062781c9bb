"""The GPU of these tests itself: what the attention kernels do not use yet, and what it must refuse."""

from __future__ import annotations

import shutil

import pytest
import torch

from helixc.codegen.config import KernelConfig
from helixc.codegen.problem import KernelSpec
from helixc.codegen.render import KernelSource
from tests.simt.cpu_kernel import ASYNCHRONY, CpuKernel, Gpu, KernelFault, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
TILE = "const helix::u32 base = helix::shared_address(helix::dynamic_shared());\n  const int thread = threadIdx.x;\n"


def kernel(
    body: str,
    arguments: str,
    monkeypatch: pytest.MonkeyPatch,
    asynchrony: str = "late",
    *,
    threads: int = 128,
    early: bool = False,
) -> CpuKernel:
    """A kernel of one block; `arguments` are those of a C++ function. `early`: also watched."""
    includes = '#include "helix/sm90.cuh"\n#include "helix/wgmma.cuh"\n'
    text = f'{includes}extern "C" void probe({arguments}) {{\n  {TILE}{body}\n}}'
    source = KernelSource(KernelConfig(KernelSpec("probe", "probe", (), "sm_90a"), threads), text, ())
    monkeypatch.setattr(CpuKernel, "gpu", Gpu(1, 7, asynchrony), raising=False)
    library = build(source, watched=early)
    pointers = ("pointer",) * arguments.count("*")
    return CpuKernel(library, "probe", pointers, threads, CPU, shared=64 << 10, early=early)


# Copies A [64][row] and B [n][row] of 128-byte rows to shared memory, swizzled as the tensor cores read them.
LOAD = """
  for (int i = thread; i < (64 + N) * 8; i += 128) {
    const int row = i / 8, piece = i % 8;
    const helix::u32 tile = row < 64 ? 0 : 8192, r = row < 64 ? row : row - 64;
    helix::store_shared(base + tile + r * 128 + (piece ^ r % 8) * 16,
                        helix::load_global((row < 64 ? a : b) + r * 128 + piece * 16));
  }
  helix::fence_async_proxy();
  __syncthreads();
"""
STORE = """
  for (int i = 0; i < N / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    out[row * N + column] = d[i];
  }
"""


@pytest.mark.parametrize("asynchrony", ASYNCHRONY)
@pytest.mark.parametrize("from_registers", [False, True], ids=["a in shared memory", "a in registers"])
@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.bfloat16, 32), (torch.float16, 16), (torch.float8_e4m3fn, 128)], ids=str
)
def test_wgmma(
    dtype: torch.dtype, from_registers: bool, columns: int, asynchrony: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    element = "e4m3" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")
    body = f"""constexpr int N = {columns};
  {LOAD}
  float d[N / 2];
  helix::wgmma_begin();
  for (int step = 0; step < 4; ++step) {{
    // A fragment's words: rows g and g + 8, 4 bytes, then the same 16 bytes on.
    const int row = thread / 32 * 16 + thread % 32 / 4, at = step * 32 + thread % 4 * 4;
    helix::u32 words[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&words[i], a + (row + i % 2 * 8) * 128 + at + i / 2 * 16, 4);
    const helix::MatrixOperand x(base, 16, 1024), y(base + 8192, 16, 1024);
    simt::wgmma({{d, N, simt::Element::{element}, step > 0, false, false, {"words" if from_registers else "nullptr"},
                 x.at(step * 32), y.at(step * 32)}});
  }}
  helix::wgmma_commit();
  helix::wgmma_wait<0>();
  {STORE}"""
    run = kernel(body, "const unsigned char* a, const unsigned char* b, float* out", monkeypatch, asynchrony)
    depth = 128 // dtype.itemsize
    a, b = torch.randn(64, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    out = torch.empty(64, columns)
    run.launch((1, 1, 1), a.data_ptr(), b.data_ptr(), out.data_ptr())
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)


def test_a_barrier_that_says_whether_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in a row, of two warps each: one thread of the first holds, then none does."""
    body = """for (int round = 0; round < 2; ++round)
    out[round * 128 + thread] = helix::named_barrier_any(1 + thread / 64, 64, round == 0 && thread == 37);"""
    run, out = kernel(body, "float* out", monkeypatch), torch.full((256,), torch.nan)
    run.launch((1, 1, 1), out.data_ptr())
    assert out[:64].all() and not out[64:].any()


@pytest.mark.parametrize("asynchrony", ASYNCHRONY)
def test_a_bulk_copy(asynchrony: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """if (thread == 0) helix::barrier_init(base, 1);
  __syncthreads();
  if (thread == 0) {
    helix::barrier_expect(base, 512);
    helix::copy_bulk(base + 1024, from, 512, base, helix::kEvictFirst);
  }
  helix::barrier_wait(base, 0);
  to[thread] = helix::load_shared(base + 1024 + 4 * thread);"""
    run = kernel(body, "const float* from, float* to", monkeypatch, asynchrony)
    source, result = torch.randn(128), torch.empty(128)
    run.launch((1, 1, 1), source.data_ptr(), result.data_ptr())
    assert torch.equal(result, source)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("__trap();", "__trap"),
        ("out[thread] = helix::load_shared(base + 70000);", "the block has"),
        ("out[thread] = helix::load_shared(base + 2);", "not a multiple of 4"),
        (
            "if (thread % 2) __syncwarp(); else __any_sync(~0u, 1);",
            "lanes of one warp are at",
        ),
        ("helix::barrier_wait(base, 0);", "there is no mbarrier"),
        (
            "if (thread != 0) return; helix::barrier_init(base, 1); helix::barrier_expect(base, 16); "
            "helix::barrier_arrive(base);",
            "more than 1 arrivals",
        ),
        (
            "if (thread == 0) helix::barrier_init(base, 3);\n __syncthreads();\n helix::barrier_wait(base, 0);",
            "(?s)deadlock:.*3 of 3 arrivals",
        ),
        ("if (thread < 32) helix::named_barrier(2, 64);", "(?s)deadlock:.*barrier 2 of the block, 32 of 64 there"),
        (
            "while (out[0] == 0) helix::load_relaxed(*reinterpret_cast<helix::u32*>(&out[1]), out);",
            "(?s)deadlock:.*another thread's write, in a loop",
        ),
        (
            "if (thread == 0) { helix::barrier_init(base, 1); helix::barrier_expect(base, 16); "
            "helix::copy_bulk(base + 16, out, 16, base, helix::kEvictFirst); }",
            "ended with a copy into its memory under way",
        ),
        (
            "float d[16]; const helix::MatrixOperand a(base, 16, 1024); "
            "helix::wgmma_m64n32k16(d, a.at(0), a.at(0), 0);",
            "without wgmma.fence",
        ),
    ],
)
def test_what_a_kernel_must_not_do(body: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernel(body, "float* out", monkeypatch)
    out = torch.zeros(128)
    with pytest.raises(KernelFault, match=fault):
        run.launch((1, 1, 1), out.data_ptr())
    # The next launch starts afresh.
    again = kernel("out[thread] = float(thread);", "float* out", monkeypatch)
    again.launch((1, 1, 1), out.data_ptr())
    assert torch.equal(out, torch.arange(128.0))


def test_fresh_shared_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    body = """__shared__ float mine[128];
  out[thread] = mine[thread];
  out[128 + thread] = helix::load_shared(base + 4 * thread);
  mine[thread] = 0.0f;"""
    run = kernel(body, "float* out", monkeypatch)
    for _ in range(2):
        out = torch.zeros(256)
        run.launch((1, 1, 1), out.data_ptr())
        assert out.isnan().all()
