"""What eager launches cost the host: `python bench/launch.py [--out FILE]`.

Microseconds of Python, torch and the driver for a call that enqueues its kernels and waits for nothing: batches of 300
calls, the GPU idle before each; medians. A captured graph pays none of this at its replays.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402

from bench.gpu_timing import compiled, empty_kernel, first_gpu, host_us, machine  # noqa: E402
from bench.steps import BLOCK, Bench, empty_cache, heads_of, make_ops, random_batch, random_projections  # noqa: E402
from helixc_runtime.attention_shape import AttentionShape  # noqa: E402
from tests.gpu.kernel_cases import gqa, mla  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "launch.json"
GOAL_US = 10.0  # of one launch by itself, without an operation's checks and allocations
BATCH, CP = 4, 2
SMALL = """
extern "C" __global__ void small(int* a, int* b, int* c, int* d, int* e, int* f, int* g, int* h, int n, int m) {
  if (n < 0) *a = m;
}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args(arguments).out
    device = first_gpu()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), device, empty_kernel(Path(temporary)), 0.0)
        alone = list(launches(bench))
        rows = alone + [row for shape in (mla(64, BLOCK), gqa(64, 8, 128, BLOCK)) for row in ops(bench, shape)]
    result: dict[str, Any] = machine() | {"host": f"Python {platform.python_version()}", "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    judged = [row for row in alone if row["launches"]]
    over = [row for row in judged if row["us"] > GOAL_US]
    print(f"goals missed: {len(over)} of {len(judged)}", *map(json.dumps, over), sep="\n  ")


def row(what: str, us: float, launched: int) -> dict[str, Any]:
    return {"what": what, "us": round(us, 2), "launches": launched}


def launches(bench: Bench) -> Iterator[dict[str, Any]]:
    """One kernel by itself, and an allocation for comparison."""
    arguments = ("pointer",) * 8 + ("int32",) * 2
    small = compiled(SMALL, "small", arguments, 32, bench.folder)
    memory = torch.zeros(8, dtype=torch.int32, device=bench.device)
    pointers = [memory.data_ptr()] * 8
    yield row("a launch without arguments", host_us(lambda: bench.empty.launch((1, 1, 1))), 1)
    yield row("a launch of 8 pointers and 2 int32", host_us(lambda: small.launch((1, 1, 1), *pointers, 1, 2)), 1)
    yield row("`torch.empty` on the GPU, for comparison", host_us(lambda: torch.empty(64, device=bench.device)), 0)
    yield row("`tensor.add_(1)`, torch's own launch, for comparison", host_us(lambda: memory.add_(1)), 0)


def ops(bench: Bench, shape: AttentionShape) -> Iterator[dict[str, Any]]:
    """What a layer calls; checks, allocation of the results and launches."""
    cuda_ops, cache = make_ops(bench, shape, CP), empty_cache(shape, bench.device)
    new, batch = random_projections(shape, BATCH, bench.device), random_batch(shape, BATCH, bench.device)
    o = torch.randn(CP, BATCH, shape.heads // CP, shape.partial_dim, device=bench.device, dtype=torch.bfloat16)
    lse = torch.randn(CP, BATCH, shape.heads // CP, device=bench.device)
    cuda_ops.begin_step(batch)
    q, name = cuda_ops.append(new, cache, batch), heads_of(shape)
    attends = 2 if shape.is_mla else 1  # partial and merge; GQA merges within the launch
    yield row(f"append, {name}", host_us(lambda: cuda_ops.append(new, cache, batch)), 1)
    yield row(f"attend, {name}", host_us(lambda: cuda_ops.attend(q, cache, batch)), attends)
    yield row(f"combine, {name}", host_us(lambda: cuda_ops.combine(o, lse)), 1)
    yield row(f"begin_step, {name}, once for all layers", host_us(lambda: cuda_ops.begin_step(batch)), 2)


if __name__ == "__main__":
    main()
