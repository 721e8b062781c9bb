"""NVRTC without a GPU: every kernel, both architectures, resources, the cache and its damage."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helixc.codegen.build import Cubin, compile_all, render_all
from helixc.codegen.nvrtc import CompileError, Nvrtc, NvrtcMissing
from helixc.codegen.problem import (
    KernelSpec,
    absorb,
    argmax,
    attention,
    batch,
    embed,
    exchange,
    ffn,
    handoff,
    merge_exchange,
    problems,
    reduce,
)
from helixc.codegen.render import KernelSource
from helixc.codegen.template_root import template_root
from tests.deployments import plan_of, role
from tests.gpu.ffn_cases import QWEN3, V3, V3_LITE
from tests.gpu.ffn_cases import ffn as mixture_of
from tests.gpu.kernel_cases import gqa, mla

pytest.importorskip("cuda.bindings.nvrtc", reason="needs helixc[nvrtc]")

ARCHES = ("sm_90a", "sm_100a")
SHAPES = [
    mla(128, 32),
    mla(16, 4, "float32"),
    replace(mla(16, 32), kv_dtype="float16"),
    mla(64, 64),
    mla(32, 32),
    mla(16, 64),
    gqa(64, 8, 128, 32),
    gqa(64, 8, 128, 64),
    gqa(16, 1, 128, 64),
    gqa(10, 2, 64, 16),
    gqa(32, 32, 64, 128),
    gqa(9, 3, 64, 4, "float32"),
    gqa(13, 1, 72, 64, "float16"),
]
APPENDS = [
    mla(128, 64, kv_dtype="float8_e4m3fn"),
    mla(16, 32, "float32", kv_dtype="float8_e4m3fn"),
    replace(gqa(64, 4, 128, 32), qk_norm=True),
    replace(gqa(64, 4, 128, 32, kv_dtype="float8_e4m3fn"), qk_norm=True),
    gqa(1, 1, 256, 16, "float16", kv_dtype="float8_e4m3fn"),
    replace(gqa(3, 1, 72, 4), rope_dim=2),
]
ATTENTION = [
    mla(128, 32, kv_dtype="float8_e4m3fn", query_tokens=4),
    mla(16, 4, "float32", kv_dtype="float8_e4m3fn"),
    mla(64, 64, query_tokens=2),
    mla(16, 32, query_tokens=3),
    mla(64, 32, query_tokens=3),
    mla(128, 64, query_tokens=2),
    mla(128, 32, query_tokens=4),
    *(mla(heads, block, kv_dtype="float8_e4m3fn") for heads in (16, 32, 64, 128) for block in (32, 64)),
    mla(16, 64, kv_dtype="float8_e4m3fn", query_tokens=3),
    mla(32, 32, kv_dtype="float8_e4m3fn", query_tokens=4),
    mla(64, 32, kv_dtype="float8_e4m3fn", query_tokens=2),
    gqa(64, 8, 128, 32, kv_dtype="float8_e4m3fn"),
    gqa(16, 1, 128, 64, kv_dtype="float8_e4m3fn"),
    gqa(32, 32, 64, 256, kv_dtype="float8_e4m3fn"),
    gqa(10, 2, 64, 16, kv_dtype="float8_e4m3fn", query_tokens=3),
    gqa(8, 2, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    gqa(8, 2, 128, 64, query_tokens=4),
    gqa(5, 1, 64, 16, query_tokens=3),
    gqa(64, 8, 128, 64, query_tokens=4),
    gqa(32, 1, 128, 64, kv_dtype="float8_e4m3fn"),
    gqa(21, 1, 64, 64, query_tokens=4),
    gqa(13, 1, 72, 64, "float16", kv_dtype="float8_e4m3fn", query_tokens=3),
]

FFNS = [
    mixture_of(V3_LITE, 2048, 704, 1408, 5472),
    mixture_of(V3, 7168, 2048, 128, experts=(0, 256)),
    mixture_of(QWEN3, 4096, 768),
]


HANDED_OVER = [
    plan_of(model, None, role(block=64, kv_dtype=kv_dtype), dtype=dtype)
    for model in ("deepseek-v3", "llama-3.1-8b")
    for dtype, kv_dtype in (("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "fp8"), ("float16", "bfloat16"))
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _specs() -> tuple[KernelSpec, ...]:
    whole = (s for arch in ARCHES for shape in SHAPES for s in problems(shape, 2, arch))
    appends = (problems(shape, 2, arch)[0] for arch in ARCHES for shape in APPENDS)
    attends = (s for arch in ARCHES for shape in ATTENTION for s in attention(shape, arch))
    groups = (
        spec
        for arch in ARCHES
        for spec in (
            *(exchange(mla(128, 64), cp, arch) for cp in (2, 8, 64)),
            exchange(gqa(64, 8, 128, 64, "float32"), 4, arch),
            *(merge_exchange(mla(128, 64), cp, arch) for cp in (2, 8, 64)),
            *(merge_exchange(mla(16, 64), cp, arch) for cp in (2, 16)),
            merge_exchange(mla(64, 64, query_tokens=3), 4, arch),
            merge_exchange(mla(32, 64, query_tokens=3), 2, arch),
            *(reduce(n, 7168, 1e-6, "bfloat16", arch) for n in (1, 2, 8)),
            reduce(2, 2048, 1e-5, "float16", arch),
            *(argmax(n, dtype, arch) for n in (1, 2, 64) for dtype in ("bfloat16", "float32")),
            *absorb(mla(16, 64), 128, 16, arch),
            *absorb(mla(128, 32, kv_dtype="float8_e4m3fn"), 192, 16, arch),
            embed(7168, "bfloat16", arch),
            batch(gqa(8, 1, 128, 32), 1.25, arch),
            *(handoff(plan.model, plan.tokens_per_block, arch) for plan in HANDED_OVER),
        )
    )
    few = (s for arch in ARCHES for shape in FFNS for s in ffn(shape, 16, arch))
    return tuple(dict.fromkeys((*whole, *appends, *attends, *groups, *few)))


def _small() -> tuple[KernelSource, ...]:
    return render_all(problems(gqa(2, 1, 64, 4), 2, "sm_90a"))


@pytest.fixture(scope="module")
def logs() -> list[str]:
    """What the compiler said of `cubins`."""
    return []


@pytest.fixture(scope="module")
def cubins(cache: Path, logs: list[str]) -> tuple[Cubin, ...]:
    read = Nvrtc._log

    def listen(self: Nvrtc, program: Any) -> str:
        logs.append(read(self, program))
        return logs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Nvrtc, "_log", listen)
        return compile_all(render_all(_specs()), cache=cache)


def test_every_kernel_compiles_for_both_architectures(cubins: tuple[Cubin, ...]) -> None:
    assert {c.source.config.spec.arch for c in cubins} == set(ARCHES)
    assert not any(c.from_cache for c in cubins)
    for cubin in cubins:
        binary = (cubin.directory / "kernel.cubin").read_bytes()
        assert binary.startswith(b"\x7fELF") and cubin.source.config.spec.name.encode() in binary
        assert (
            0 < cubin.registers <= 255
            and 0 <= cubin.shared_bytes <= 48 * 1024
            and (cubin.kernel().shared_bytes or 0) <= 227 * 1024
        )
        assert (cubin.directory / "kernel.cu").read_text() == cubin.source.text


def test_nothing_spills(cubins: tuple[Cubin, ...]) -> None:
    """Zero is the contract of all kernels."""
    assert {c.source.config.spec.name: c.spill_bytes for c in cubins if c.spill_bytes} == {}


def test_no_warpgroup_product_is_serialized(cubins: tuple[Cubin, ...], logs: list[str]) -> None:
    """Short of registers, ptxas waits for each wgmma before the next: half as fast, and only its log tells."""
    assert len(logs) >= len(cubins)
    assert [line for log in logs for line in log.splitlines() if "wgmma" in line] == []


def test_the_partial_kernel_uses_the_shared_memory_its_choice_reckoned_with(cubins: tuple[Cubin, ...]) -> None:
    for cubin in cubins:
        if cubin.source.config.spec.template in ("append", "merge", "combine"):
            assert cubin.shared_bytes == 0
        if cubin.source.config.spec.template != "partial":
            continue
        params = cubin.source.config.params
        assert cubin.shared_bytes >= 4 * int(params["head_tile"]) * int(params["head_dim"])


def test_a_second_compile_compiles_nothing(
    cubins: tuple[Cubin, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Nvrtc, source: KernelSource) -> None:
        raise AssertionError(f"compiled {source.config.spec.name} again")

    monkeypatch.setattr(Nvrtc, "compile", refuse)
    seen: list[tuple[int, int]] = []
    again = compile_all(render_all(_specs()), lambda cubin, done, total: seen.append((done, total)), cache)
    assert all(c.from_cache for c in again)
    assert [c.kernel() for c in again] == [c.kernel() for c in cubins]
    assert seen == [(n, len(again)) for n in range(1, len(again) + 1)]


def test_the_manifest_entry_is_complete(cubins: tuple[Cubin, ...]) -> None:
    for cubin in cubins:
        kernel = cubin.kernel()
        assert kernel.cubin == f"kernels/{cubin.directory.name}/kernel.cubin"
        meta = json.loads((cubin.directory / "meta.json").read_text())
        assert (meta["name"], meta["arch"], meta["params"]) == (kernel.name, kernel.arch, kernel.params)
        assert meta["compiler"] == f"nvrtc {Nvrtc().version}"
        assert None not in (kernel.registers, kernel.shared_bytes, kernel.spill_bytes)


@pytest.mark.parametrize("damaged", ["kernel.cubin", "kernel.cu", "meta.json"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damaged: str) -> None:
    first = compile_all(_small()[:2], cache=tmp_path)
    good = (first[1].directory / "kernel.cubin").read_bytes()
    (first[1].directory / damaged).write_bytes(b"{}")
    second = compile_all(_small()[:2], cache=tmp_path)
    assert [c.from_cache for c in second] == [True, False]
    assert (second[1].directory / "kernel.cubin").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(c.directory.name for c in second)


def _compile_in_process(folder: str) -> list[str]:
    return [cubin.directory.name for cubin in compile_all(_small(), cache=Path(folder))]


def test_processes_share_a_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.map(_compile_in_process, [str(tmp_path)] * 2)
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(one)
    assert all(cubin.from_cache for cubin in compile_all(_small(), cache=tmp_path))


def _with_change(tmp_path: Path, file: str, line: int, text: str) -> tuple[KernelSource, ...]:
    root = tmp_path / "templates"
    shutil.copytree(template_root(), root)
    path = root / file
    lines = path.read_text().splitlines()
    lines[line - 1] += f" {text}"
    path.write_text("\n".join(lines) + "\n")
    return render_all(problems(gqa(2, 1, 64, 4), 2, "sm_90a")[:1], root)


@pytest.mark.parametrize(
    ("file", "named"),
    [("kernels/append.cu.j2", "kernels/append.cu.j2"), ("include/helix/append.cuh", "helix/append.cuh")],
)
def test_a_failing_compile_names_the_line(tmp_path: Path, file: str, named: str) -> None:
    lines = (template_root() / file).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, start=1) if text == "}" or text.startswith("}  // namespace"))
    sources = _with_change(tmp_path, file, line, "\nint oops = nonsense;")
    with pytest.raises(CompileError, match=rf'(?s)append_gqa_h2.* sm_90a.*{named}\({line + 1}\).*"nonsense"') as caught:
        compile_all(sources, cache=tmp_path / "cache")
    assert str(template_root()) not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))  # a failure leaves no entry


def test_without_the_binding_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(NvrtcMissing, match=r"pip install 'helixc\[nvrtc\]'"):
        compile_all(_small(), cache=tmp_path)


def test_the_key_covers_architecture_and_text(tmp_path: Path) -> None:
    names = {
        cubin.directory.name
        for arch in ARCHES
        for dim in (64, 72)
        for cubin in compile_all(render_all(problems(gqa(2, 1, dim, 4), 1, arch)[2:3]), cache=tmp_path)
    }
    assert len(names) == 4
