"""Append and combine on one GPU: `python bench/steps.py [--only append,combine] [--out FILE]`.

Every row is one launch for one layer, replayed in a CUDA graph over several sets of inputs (as many as exceed the L2
together, 256 at most); medians. An empty kernel is replayed in turn with it. The floor is the bytes that must move,
inputs, outputs and cache, at the bandwidth that torch's copy reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu_timing import L2_BYTES, Launch, copy_bandwidth, earlier_rows, empty_kernel, first_gpu, machine, medians  # noqa: E402
from helixc.codegen.build import compile_all, render_all  # noqa: E402
from helixc.codegen.problem import problems  # noqa: E402
from helixc_runtime.attention_shape import AttentionShape  # noqa: E402
from helixc_runtime.cubin import LoadedKernel, device_arch  # noqa: E402
from helixc_runtime.ops import DecodeBatch, GqaProjections, LayerCache, MlaProjections, Ops, Projections  # noqa: E402
from helixc_runtime.ops_cuda import CudaOps  # noqa: E402
from tests.gpu.kernel_cases import gqa, mla  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "steps.json"
BLOCK, PAGES, MOST_SETS, LEAST_LAUNCHES = 64, 2048, 256, 64
BATCHES, RANKS = (1, 8, 32, 128), (2, 4, 8)
SHAPES = [mla(heads, BLOCK) for heads in (16, 64, 128)] + [gqa(64, 8, 128, BLOCK), gqa(8, 1, 128, BLOCK)]
GOAL_OVER_EMPTY_US, GOAL_SHARE = 2.0, 0.85  # at batch 1; at the largest batch


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    folder: Path  # of the compiled kernels
    device: torch.device
    empty: LoadedKernel
    bandwidth: float  # bytes a second


@dataclass(frozen=True)
class Step:
    """One row of the table. `make(i)` gives the launch on its i-th set of inputs."""

    op: str
    case: str
    batch: int
    dtype: str
    bytes: int  # that one launch must move
    make: Callable[[], Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="append,combine", help="by default both")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = first_gpu()
    ops, failures = options.only.split(","), []
    result = machine()
    rows = result["rows"] = [row for row in earlier_rows(options.out, result) if row["op"] not in ops]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(folder, device, empty_kernel(folder), copy_bandwidth(device))
        result["copy_bandwidth"] = round(bench.bandwidth / 1e12, 3)
        for op in ops:
            for variant in {"append": append_variants, "combine": combine_variants}[op](bench):
                try:
                    for step in variant():
                        rows.append(measure(bench, step))
                        print(json.dumps(rows[-1]), flush=True)
                except Exception as error:  # one shape must not stop the others
                    failures.append(f"{op}: {type(error).__name__}: {error}")
                    print(failures[-1], flush=True)
                torch.cuda.empty_cache()
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(rows, failures))
    return 1 if failures else 0


def measure(bench: Bench, step: Step) -> dict[str, Any]:
    """One row."""
    sets = max(2, min(MOST_SETS, 2 * L2_BYTES // step.bytes + 1))
    made = [step.make() for _ in range(sets)]
    runs: dict[str, Launch] = {"ours": lambda i: made[i](), "empty": lambda i: bench.empty.launch((1, 1, 1))}
    times = medians(runs, sets, sets * -(-LEAST_LAUNCHES // sets))
    floor = step.bytes / bench.bandwidth * 1e6
    return {
        "op": step.op,
        "dtype": step.dtype,
        "case": step.case,
        "batch": step.batch,
        "ours_us": round(times["ours"], 2),
        "empty_us": round(times["empty"], 2),
        "floor_us": round(floor, 3),
        "share": round(floor / times["ours"], 3),
    }


def missed(row: dict[str, Any]) -> bool:
    """Whether a row misses its goal. What takes as long as an empty kernel cannot be made to use the bandwidth."""
    is_short = row["ours_us"] <= row["empty_us"] + GOAL_OVER_EMPTY_US
    if row["batch"] == 1:
        return not is_short
    return row["batch"] == max(BATCHES) and row["share"] < GOAL_SHARE and not is_short


def summary(rows: Sequence[dict[str, Any]], failures: Sequence[str]) -> str:
    """The goals missed, and what could not be measured."""
    judged = [row for row in rows if row["batch"] in (1, max(BATCHES))]
    lines = [f"goals missed: {sum(map(missed, judged))} of {len(judged)}"]
    lines += [
        f"  {row['op']} {row['case']}, {row['dtype']}: {row['ours_us']} us, empty {row['empty_us']} us, "
        f"{row['share']:.0%} of the bandwidth"
        for row in judged
        if missed(row)
    ]
    lines += [f"not measured: {failure}" for failure in failures]
    return "\n".join(lines)


def heads_of(shape: AttentionShape) -> str:
    return f"MLA H {shape.heads}" if shape.is_mla else f"GQA ({shape.heads},{shape.kv_heads})"


# --- Append -----------------------------------------------------------------------------------------------------


def append_variants(bench: Bench) -> Iterator[Callable[[], Iterator[Step]]]:
    """Both caches of every shape."""
    for shape in SHAPES:
        yield lambda shape=shape: appends(bench, shape)
        yield lambda shape=shape: appends(bench, replace(shape, kv_dtype="float8_e4m3fn"))


def appends(bench: Bench, shape: AttentionShape) -> Iterator[Step]:
    """Every batch size of one shape; all rows own their token."""
    ops, cache = make_ops(bench, shape, 2), empty_cache(shape, bench.device)
    for batch in BATCHES:
        projections = (shape.heads + shape.kv_heads * (1 if shape.is_mla else 2)) * shape.head_dim * 2
        stored = shape.heads * shape.head_dim * 2 + cached_bytes(shape)  # the queries go to memory, too
        angles = shape.rope_dim * 4
        step_bytes = batch * (projections + stored + angles + 9)

        def make(batch: int = batch) -> Callable[[], object]:
            new, step = random_projections(shape, batch, bench.device), random_batch(shape, batch, bench.device)
            return lambda: ops.append(new, cache, step)

        yield Step("append", f"{heads_of(shape)}, batch {batch}", batch, shape.kv_dtype, step_bytes, make)


def cached_bytes(shape: AttentionShape) -> int:
    """What one token takes in the cache."""
    element = 1 if shape.scale_bytes else 2
    width = shape.head_dim * element + shape.scale_bytes
    return shape.kv_heads * width * (1 if shape.is_mla else 2)


def random_projections(shape: AttentionShape, batch: int, device: torch.device) -> Projections:
    """As strided as a model's: MLA's absorbed queries come with the heads outermost, q_rope is part of each head."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    if shape.is_mla:
        q_latent = normal(shape.heads, batch, shape.partial_dim).transpose(0, 1)
        q_rope = normal(batch, shape.heads, 128 + shape.rope_dim)[..., 128:]
        return MlaProjections(q_latent, q_rope, normal(batch, shape.head_dim), normal(shape.partial_dim))
    q, k, v = (normal(batch, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return GqaProjections(q, k, v)


def random_batch(shape: AttentionShape, batch: int, device: torch.device) -> DecodeBatch:
    """Rows that all own their token, each in a page of its own."""
    pages = torch.randperm(PAGES, device=device)[:batch]
    slots = pages * BLOCK + torch.randint(0, BLOCK, (batch,), device=device)
    angles = torch.rand(batch, shape.rope_dim // 2, device=device) * 2 * math.pi
    return DecodeBatch(
        cos=angles.cos(),
        sin=angles.sin(),
        page_table=pages.int().unsqueeze(1),
        lengths=torch.full((batch,), 1, dtype=torch.int32, device=device),
        owned=torch.ones(batch, dtype=torch.uint8, device=device),
        slots=slots,
    )


def empty_cache(shape: AttentionShape, device: torch.device) -> LayerCache:
    size = (PAGES, BLOCK) if shape.is_mla else (PAGES, shape.kv_heads, BLOCK)
    count = 1 if shape.is_mla else 2
    dtype = torch.float8_e4m3fn if shape.scale_bytes else torch.bfloat16
    k, *v = (torch.zeros(*size, shape.head_dim, device=device).to(dtype) for _ in range(count))
    scales: list[Tensor | None] = [None, None]
    if shape.scale_bytes:
        scales[:count] = (torch.zeros(*size, shape.scale_bytes, dtype=torch.uint8, device=device) for _ in range(count))
    return LayerCache(k, v[0] if v else None, *scales)


# --- Combine ----------------------------------------------------------------------------------------------------


def combine_variants(bench: Bench) -> Iterator[Callable[[], Iterator[Step]]]:
    """Every shape on so many cp ranks."""
    for shape in SHAPES:
        for cp in RANKS:
            yield lambda shape=shape, cp=cp: combines(bench, shape, cp)


def combines(bench: Bench, shape: AttentionShape, cp: int) -> Iterator[Step]:
    """Every batch size; a rank merges H / cp heads after the exchange."""
    ops, heads = make_ops(bench, shape, cp), shape.heads // cp
    for batch in BATCHES:
        step_bytes = (cp + 1) * batch * heads * (shape.partial_dim * 2 + 4)

        def make(batch: int = batch) -> Callable[[], object]:
            o = torch.randn(cp, batch, heads, shape.partial_dim, device=bench.device, dtype=torch.bfloat16)
            lse = torch.randn(cp, batch, heads, device=bench.device)
            return lambda: ops.combine(o, lse)

        yield Step("combine", f"{heads_of(shape)}, cp {cp}, batch {batch}", batch, shape.dtype, step_bytes, make)


def make_ops(bench: Bench, shape: AttentionShape, cp: int) -> Ops:
    sources = render_all(problems(shape, cp, device_arch(bench.device)))
    kernels = [cubin.kernel() for cubin in compile_all(sources, cache=bench.folder / "kernels")]
    return CudaOps(shape, kernels, bench.folder, bench.device)


if __name__ == "__main__":
    sys.exit(main())
