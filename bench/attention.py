"""Decode attention against its peers on one GPU: `python bench/attention.py [--only PARTS] [--out FILE]`.

Every row is one launch of attention for one layer: ours (as Ops.attend launches it), each peer that can be imported
(peers.py), and a plain read of the same pages. All are captured in CUDA graphs over several page tables, so that no
replay finds its KV in L2, and replayed in turn; medians. Schedules (ours, and the peers' plan) are made before: they
serve all layers of a step. Every result is compared with the peers'.

Parts: mla and gqa, bfloat16, one query token a row; fp8, the FP8 cache against the same values in bfloat16; queries,
two and four query tokens a row. About one minute each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu_timing import L2_BYTES, READ, READ_ARGUMENTS, compiled, earlier_rows, first_gpu, machine, medians  # noqa: E402
from bench.peers import Attention, Peer, Problem, peers  # noqa: E402
from helixc.codegen.build import compile_all, render_all  # noqa: E402
from helixc.codegen.problem import problems  # noqa: E402
from helixc_runtime.attend_cuda import address  # noqa: E402
from helixc_runtime.attention_shape import AttentionShape  # noqa: E402
from helixc_runtime.cubin import LoadedKernel, device_arch  # noqa: E402
from helixc_runtime.ops import DecodeBatch, LayerCache, Ops  # noqa: E402
from helixc_runtime.ops_cuda import CudaOps  # noqa: E402
from helixc_runtime.quantize import dequantize, quantize  # noqa: E402
from tests.gpu.kernel_cases import gqa, mla  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "attention.json"
K, BLOCK, POOL_BYTES = 1024, 64, 2_400_000_000
LEAST_PAGES = 9 * K  # for the longest case
MOST_LAUNCHES = 64  # of one graph
GOALS = (  # (part, heads, lengths, least ratio): the first that fits a row; of the fp8 part, bfloat16's time / ours
    ("mla", "H 128", "1x64k", 1.35),
    ("mla", None, "1x64k", 1.7),
    ("mla", None, "1x16k", 1.5),
    ("mla", "H 128", None, 1.0),
    ("mla", None, "1x512k", 1.1),
    *(("gqa", heads, "1x64k", 1.5) for heads in ("(16,1)", "(8,1)")),
    *(("gqa", heads, None, 1.1) for heads in ("(16,1)", "(8,1)")),
    ("fp8", "H 128", None, 1.0),
    ("fp8", None, None, 1.7),
    (None, None, None, 1.0),
)
MOST_ERROR = 1e-2  # relative, between two implementations
RAGGED = [int(K * 2 ** (i * 8 / 15)) for i in range(16)]  # 1k to 256k
MLA_LENGTHS = {
    "1x16k": [16 * K],
    "1x64k": [64 * K],
    "1x512k": [512 * K],
    "4x128k": [128 * K] * 4,
    "8x32k": [32 * K] * 8,
    "32x8k": [8 * K] * 32,
    "128x4k": [4 * K] * 128,
    "ragged 16x1k-256k": RAGGED,
}
GQA_LENGTHS = {
    "1x64k": [64 * K],
    "1x512k": [512 * K],
    "8x32k": [32 * K] * 8,
    "32x8k": [8 * K] * 32,
    "128x2k": [2 * K] * 128,
}
GQA_HEADS = ((64, 8), (32, 8), (64, 4), (16, 1), (8, 1))
Case = tuple[AttentionShape, dict[str, list[int]]]


def some(lengths: dict[str, list[int]], *names: str) -> dict[str, list[int]]:
    return {name: lengths[name] for name in names}


PARTS: dict[str, list[Case]] = {
    "mla": [(mla(heads, BLOCK), MLA_LENGTHS) for heads in (128, 64, 32, 16)],
    "gqa": [(gqa(*heads, 128, BLOCK), GQA_LENGTHS) for heads in GQA_HEADS],
    "fp8": [
        (replace(mla(heads, BLOCK), kv_dtype="float8_e4m3fn"), some(MLA_LENGTHS, "1x64k", "1x512k", "8x32k", "128x4k"))
        for heads in (128, 64, 16)
    ]
    + [
        (replace(gqa(*heads, 128, BLOCK), kv_dtype="float8_e4m3fn"), some(GQA_LENGTHS, "1x64k", "1x512k", "8x32k"))
        for heads in ((64, 8), (16, 1), (8, 1))
    ],
    "queries": [
        (replace(shape, query_tokens=tokens), some(lengths, "1x64k", "8x32k", "32x8k"))
        for tokens in (2, 4)
        for shape, lengths in (
            (mla(128, BLOCK), MLA_LENGTHS),
            (mla(16, BLOCK), MLA_LENGTHS),
            (gqa(64, 8, 128, BLOCK), GQA_LENGTHS),
            (gqa(8, 1, 128, BLOCK), GQA_LENGTHS),
        )
    ],
}


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    folder: Path  # of the compiled kernels
    device: torch.device
    found: list[Peer]
    read: LoadedKernel


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for and write the results. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, by default {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = first_gpu()
    found, failures = peers(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reader = compiled(READ, "read_pages", READ_ARGUMENTS, 512, folder, early=True)
        bench = Bench(folder, device, found, reader)
        parts = options.only.split(",")
        result: dict[str, Any] = machine()
        result["rows"] = [row for row in earlier_rows(options.out, result) if part_of(row) not in parts]
        kept = json.loads(options.out.read_text())["peers"] if result["rows"] else {}
        result["peers"] = kept | {part: {peer.name: peer.version for peer in found} for part in parts}
        for part in parts:
            start = time.monotonic()
            for shape, cases in PARTS[part]:
                try:
                    for row in measure(bench, shape, cases):
                        result["rows"].append(row)
                        print(json.dumps(row), flush=True)
                except Exception as error:  # one shape must not stop the others
                    failures.append(f"{heads_of(shape)}, {part}: {type(error).__name__}: {error}")
                    print(failures[-1], flush=True)
                torch.cuda.empty_cache()
                result["rows"].sort(key=lambda row: list(PARTS).index(part_of(row)))  # stable
                options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    print(summary(result["rows"], failures))
    return 1 if failures else 0


def part_of(row: dict[str, Any]) -> str:
    """The part that measures this row."""
    if row["dtype"] != "bfloat16":
        return "fp8"
    return "queries" if row.get("query_tokens", 1) > 1 else str(row["op"])


def goal_of(row: dict[str, Any]) -> float:
    """The least ratio that this row is to reach."""
    lengths, heads = row["case"].split(", ")[:2]
    for part, of_heads, of_lengths, least in GOALS:
        if part in (None, part_of(row)) and of_heads in (None, heads) and of_lengths in (None, lengths):
            return least
    raise AssertionError("the last goal fits all")


def summary(rows: Sequence[dict[str, Any]], failures: Sequence[str]) -> str:
    """The goals missed, and what could not be measured."""
    compared = [row for row in rows if row["ratio"] is not None]
    missed = [row for row in compared if row["ratio"] < goal_of(row)]
    lines = [f"goals missed: {len(missed)} of {len(compared)}"]
    lines += [
        f"  {part_of(row)} {row['case']}: {row['ours_us']} us, {row['peer']} {row['peer_us']} us "
        f"({row['ratio']}, goal {goal_of(row)})"
        for row in missed
    ]
    lines += [f"not measured: {failure}" for failure in failures]
    return "\n".join(lines)


def measure(bench: Bench, shape: AttentionShape, cases: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    cache, twin = pool(shape, bench.device)
    for case, lengths in cases.items():
        problem = make_problem(shape, lengths, cache, bench.device)
        runs = {"ours": ours(problem, lambda: make_ops(shape, bench))}
        if twin is not None:
            plain = replace(shape, kv_dtype="bfloat16")
            in_bfloat16 = replace(problem, shape=plain, cache=twin)
            runs["ours, bfloat16 cache"] = ours(in_bfloat16, lambda: make_ops(plain, bench))  # noqa: B023, used at once
        for peer in (peer for peer in bench.found if peer.serves(problem)):
            try:
                runs[peer.name] = peer.prepare(problem)
                runs[peer.name](0)
            except Exception as error:  # a peer that cannot run here must not stop the others
                print(f"{peer.name} cannot run {case}: {type(error).__name__}: {error}")
                runs.pop(peer.name, None)
        agree(runs)
        runs["read"] = read(problem, bench.read)
        sets = len(problem.tables)
        launches = sets * max(1, min(MOST_LAUNCHES, int(2000 / (problem.kv_bytes / 3e6 + 5))) // sets)
        yield report(case, problem, medians(runs, sets, launches))


def report(case: str, problem: Problem, times: dict[str, float]) -> dict[str, Any]:
    """One row of the results."""
    shape = problem.shape
    ours_us, floor_us = times.pop("ours"), times.pop("read")
    peer = min(times, key=lambda name: times[name]) if times else None
    return {
        "op": "mla" if shape.is_mla else "gqa",
        "dtype": shape.kv_dtype,
        "query_tokens": shape.query_tokens,
        "case": f"{case}, {heads_of(shape)}",
        "ours_us": round(ours_us, 2),
        "peer": peer,
        "peer_us": round(times[peer], 2) if peer else None,
        "ratio": round(times[peer] / ours_us, 3) if peer else None,
        "floor_us": round(floor_us, 2),
        "tflops": round(problem.flop / ours_us / 1e6),
    }


def heads_of(shape: AttentionShape) -> str:
    heads = f"H {shape.heads}" if shape.is_mla else f"({shape.heads},{shape.kv_heads})"
    return heads if shape.query_tokens == 1 else f"{heads}, {shape.query_tokens} query tokens"


def agree(runs: dict[str, Attention]) -> None:
    """All implementations compute the same, within bfloat16."""
    mine = runs["ours"](1).double()
    for name, launch in runs.items():
        error = float((launch(1).double() - mine).norm() / mine.norm())
        assert error <= MOST_ERROR, f"{name} differs from ours by {error}"


# --- Problems ---------------------------------------------------------------------------------------------------


def pool(shape: AttentionShape, device: torch.device) -> tuple[LayerCache, LayerCache | None]:
    """Pages of random numbers, about 2.4 GB in bfloat16; of an FP8 pool, the same values in bfloat16 as well."""
    size = (BLOCK, shape.head_dim) if shape.is_mla else (shape.kv_heads, BLOCK, shape.head_dim)
    matrices = 1 if shape.is_mla else 2
    pages = max(POOL_BYTES // (matrices * 2 * math.prod(size)), LEAST_PAGES)
    wide = [torch.empty(pages, *size, dtype=torch.bfloat16, device=device) for _ in range(matrices)]
    narrow = [torch.empty(t.shape, dtype=torch.float8_e4m3fn, device=device) for t in wide if shape.scale_bytes]
    scale_size = (pages, *size[:-1], shape.scale_bytes)
    scales = [torch.empty(scale_size, dtype=torch.uint8, device=device) for _ in narrow]
    for i, tensor in enumerate(wide):
        for at in range(0, pages, K):
            part = tensor[at : at + K].normal_()
            if narrow:
                elements, exponents = quantize(part)
                narrow[i][at : at + K], scales[i][at : at + K] = elements, exponents
                part.copy_(dequantize(elements, exponents))
    plain = LayerCache(wide[0], None if shape.is_mla else wide[1])
    if not narrow:
        return plain, None
    values = (None, scales[0], None) if shape.is_mla else (narrow[1], *scales)
    return LayerCache(narrow[0], *values), plain


def make_problem(shape: AttentionShape, lengths: list[int], cache: LayerCache, device: torch.device) -> Problem:
    """Enough page tables that their KV is several times the L2, pages in random order."""
    pages = [-(-length // BLOCK) for length in lengths]
    tokens = len(lengths) * shape.query_tokens
    q = torch.randn(tokens, shape.heads, shape.head_dim, device=device).bfloat16()
    problem = Problem(shape, lengths, q, cache, [])
    sets = max(2, min(8, 4 * L2_BYTES // problem.kv_bytes + 1))
    for _ in range(sets):
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=device)
        order = torch.randperm(cache.k.shape[0], device=device)[: sum(pages)].int()
        for row, part in enumerate(order.split(pages)):
            table[row, : len(part)] = part
        problem.tables.append(table)
    return problem


def make_ops(shape: AttentionShape, bench: Bench) -> Ops:
    """CudaOps from cubins that are compiled once."""
    sources = render_all(problems(shape, 2, device_arch(bench.device)))
    kernels = [cubin.kernel() for cubin in compile_all(sources, cache=bench.folder / "kernels")]
    return CudaOps(shape, kernels, bench.folder, bench.device)


def ours(problem: Problem, make: Callable[[], Ops]) -> Attention:
    """Ops.attend, with one Ops a page table: each holds the schedule of its step."""
    device, count = problem.q.device, problem.shape.query_tokens
    bounds = [length - behind for length in problem.lengths for behind in reversed(range(count))]
    lengths = torch.tensor(bounds, dtype=torch.int32, device=device)
    unused = torch.zeros(0, device=device)
    batches = [DecodeBatch(unused, unused, table, lengths, unused, unused) for table in problem.tables]
    ops = [make() for _ in batches]
    for op, batch in zip(ops, batches, strict=True):
        op.begin_step(batch)
    torch.cuda.synchronize()
    return lambda i: ops[i].attend(problem.q, problem.cache, batches[i]).o


def read(problem: Problem, reader: LoadedKernel) -> Attention:
    """Read each page of the problem's cache once: K, V and scales, as far as there are such."""
    cache, sink = problem.cache, torch.zeros(1, dtype=torch.int32, device=problem.q.device)
    pages = [-(-length // BLOCK) for length in problem.lengths]
    tables = [torch.cat([t[row, :n] for row, n in enumerate(pages)]).contiguous() for t in problem.tables]
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    vectors = [0 if t is None else t[0].numel() * t.element_size() // 16 for t in tensors]
    grid = (4 * 132, 1, 1)  # as many as an H100 or H200 runs at once

    def launch(i: int) -> Tensor:
        reader.launch(grid, *map(address, (*tensors, tables[i], sink)), *vectors, len(tables[i]))
        return sink

    return launch


if __name__ == "__main__":
    sys.exit(main())
