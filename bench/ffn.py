"""FFN and projections of few tokens on one GPU: `python bench/ffn.py [--only mixture,mlp,linear] [--out FILE]`.

Every row is one call for one layer, replayed in a CUDA graph over several sets of weights and tokens that exceed the L2
together; medians, torch's own (cuBLAS, grouped products) in turn with ours. The floor is the bytes of the weights that
these tokens touch, at the bandwidth that torch's copy reaches in the same run.
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

from bench.gpu_timing import L2_BYTES, copy_bandwidth, first_gpu, machine, medians  # noqa: E402
from helixc.codegen.build import compile_all, render_all  # noqa: E402
from helixc.codegen.problem import ffn as problems  # noqa: E402
from helixc_runtime.cubin import device_arch  # noqa: E402
from helixc_runtime.ffn_cuda import CudaFfn  # noqa: E402
from helixc_runtime.ffn_shape import FfnShape  # noqa: E402
from helixc_runtime.models.layers import gated_mlp, linear, mix, route  # noqa: E402
from helixc_runtime.ops import Mixture  # noqa: E402
from helixc_runtime.ops_cuda import load_kernel  # noqa: E402
from tests.gpu.ffn_cases import QWEN3, V3, V3_LITE, ffn, random_mlp  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "ffn.json"
ROWS, LEAST_LAUNCHES, MOST_SETS = (1, 8, 16), 24, 24
# One rank's share of a layer, by name.
MIXTURES: dict[str, FfnShape] = {
    "DeepSeek-V3-Lite, tp 2": ffn(V3_LITE, 2048, 704, 1408),
    "DeepSeek-V3-Lite, ep 2": ffn(V3_LITE, 2048, 1408, 1408, experts=(0, 32)),
    "DeepSeek-V3, ep 8": ffn(V3, 7168, 2048, 256, experts=(0, 32)),
    "Qwen3-MoE 235B, tp 8": ffn(QWEN3, 4096, 192),
}
MLPS: dict[str, FfnShape] = {
    "DeepSeek-V3-Lite, tp 2": ffn(None, 2048, dense=5472),
    "Llama-3.1-8B, tp 2": ffn(None, 4096, dense=7168),
}
# [rows, columns], or [heads, rows, columns]; the last says how the checkpoint has it.
LINEARS: dict[str, tuple[tuple[int, ...], str]] = {
    "DeepSeek-V3-Lite, q and latent": ((3648, 2048), "rows"),
    "DeepSeek-V3-Lite, W_UK of 16 heads": ((16, 512, 128), "columns"),
    "DeepSeek-V3-Lite, W_UV of 8 heads": ((8, 128, 512), "rows"),
    "DeepSeek-V3-Lite, output of 8 heads": ((2048, 1024), "rows"),
    "DeepSeek-V3-Lite, half of the LM head": ((51200, 2048), "rows"),
    "Llama-3.1-8B, q, k and v, tp 2": ((3072, 4096), "rows"),
    "Llama-3.1-8B, output, tp 2": ((4096, 2048), "rows"),
}


@dataclass(frozen=True)
class Call:
    """One set of inputs: the same problem for us and for torch."""

    ours: Callable[[], object]
    torch: Callable[[], object]
    bytes: int  # of weights that are touched


@dataclass(frozen=True)
class Row:
    """One row of the table. `make()` gives a set of inputs, of about so many bytes."""

    op: str
    case: str
    rows: int
    set_bytes: int
    make: Callable[[], Call]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="mixture,mlp,linear", help="by default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device, failures = first_gpu(), []
    result: dict[str, Any] = machine()
    rows = result["rows"] = []
    with tempfile.TemporaryDirectory() as temporary:
        bandwidth = copy_bandwidth(device)
        result["copy_bandwidth"] = round(bandwidth / 1e12, 3)
        for op in options.only.split(","):
            for case in {"mixture": mixtures, "mlp": mlps, "linear": linears}[op](Path(temporary), device):
                try:
                    rows += [measure(row, bandwidth) for row in case()]
                except Exception as error:  # one shape must not stop the others
                    failures.append(f"{op}: {type(error).__name__}: {error}")
                    print(failures[-1], flush=True)
                torch.cuda.empty_cache()
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / max(1, len(rows)))
    print(f"torch / ours: {mean:.2f} (geometric mean of {len(rows)})", *failures, sep="\n")
    return 1 if failures else 0


def measure(row: Row, bandwidth: float) -> dict[str, Any]:
    """One row of the results."""
    sets = max(2, min(MOST_SETS, 2 * L2_BYTES // row.set_bytes + 1))
    calls = [row.make() for _ in range(sets)]
    runs = {"ours": lambda i: calls[i].ours(), "torch": lambda i: calls[i].torch()}
    times = medians(runs, sets, sets * -(-LEAST_LAUNCHES // sets))
    floor = sum(call.bytes for call in calls) / sets / bandwidth * 1e6
    found = {
        "op": row.op,
        "case": row.case,
        "rows": row.rows,
        "ours_us": round(times["ours"], 2),
        "torch_us": round(times["torch"], 2),
        "ratio": round(times["torch"] / times["ours"], 2),
        "floor_us": round(floor, 2),
        "share": round(floor / times["ours"], 3),
    }
    print(json.dumps(found), flush=True)
    return found


def make_ffn(shape: FfnShape, folder: Path, device: torch.device) -> CudaFfn:
    """The kernels of one rank."""
    sources = render_all(problems(shape, max(ROWS), device_arch(device)))
    kernels = [cubin.kernel() for cubin in compile_all(sources, cache=folder / "kernels")]
    loaded = {kernel.name: load_kernel(kernel, folder, device) for kernel in kernels}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaFfn(shape, kernels, loaded, processors, device)


def mixtures(folder: Path, device: torch.device) -> Iterator[Callable[[], Iterator[Row]]]:
    """Every mixture, each with all numbers of rows."""
    for name, shape in MIXTURES.items():
        yield lambda name=name, shape=shape: mixture_rows(name, shape, make_ffn(shape, folder, device), device)


def mixture_rows(name: str, shape: FfnShape, kernels: CudaFfn, device: torch.device) -> Iterator[Row]:
    moe, (lo, hi) = shape.moe, shape.experts or (0, 0)
    assert moe is not None
    each, shared = (3 * 2 * shape.hidden * columns for columns in (shape.expert_columns, shape.shared_columns))
    generator = torch.Generator(device).manual_seed(0)
    for rows in ROWS:

        def make(rows: int = rows) -> Call:
            scale = shape.hidden**-0.5
            router = (torch.randn(moe.experts, shape.hidden, generator=generator, device=device) * scale).bfloat16()
            bias = torch.zeros(moe.experts, device=device) if moe.correction_bias else None
            experts = random_mlp(shape.hidden, shape.expert_columns, generator, shape.local_experts)
            always = random_mlp(shape.hidden, shape.shared_columns, generator) if shape.shared_columns else None
            weights = Mixture(router, bias, experts, always)
            x = tokens(rows, shape.hidden, generator)
            chosen = route(moe, x.float() @ router.float().T, bias)[0]
            active = len(chosen[(chosen >= lo) & (chosen < hi)].unique())
            moved = active * each + shared + router.nbytes
            return Call(
                lambda: kernels.mixture(x, weights), lambda: mix(moe, shape.experts or (0, 0), weights, x), moved
            )

        yield Row("mixture", f"{name}, batch {rows}", rows, shape.local_experts * each // 4, make)


def mlps(folder: Path, device: torch.device) -> Iterator[Callable[[], Iterator[Row]]]:
    """Every dense MLP."""
    for name, shape in MLPS.items():
        yield lambda name=name, shape=shape: mlp_rows(name, shape, make_ffn(shape, folder, device), device)


def mlp_rows(name: str, shape: FfnShape, kernels: CudaFfn, device: torch.device) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    for rows in ROWS:

        def make(rows: int = rows) -> Call:
            weights, x = random_mlp(shape.hidden, shape.dense_columns, generator), tokens(rows, shape.hidden, generator)
            moved = 3 * weights.gate.nbytes
            plain = (weights.gate, weights.up, weights.down)
            return Call(lambda: kernels.mlp(x, weights), lambda: gated_mlp(x, *plain), moved)

        yield Row("mlp", f"{name}, batch {rows}", rows, 6 * shape.hidden * shape.dense_columns, make)


def linears(folder: Path, device: torch.device) -> Iterator[Callable[[], Iterator[Row]]]:
    """Every projection."""
    for name, (size, stored) in LINEARS.items():
        shape = replace(next(iter(MLPS.values())), dense_columns=0)
        yield lambda name=name, size=size, stored=stored, shape=shape: linear_rows(
            name, size, stored, make_ffn(shape, folder, device), device
        )


def linear_rows(name: str, size: tuple[int, ...], stored: str, kernels: CudaFfn, device: torch.device) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    for rows in ROWS:

        def make(rows: int = rows) -> Call:
            weight = (torch.randn(*size, generator=generator, device=device) * size[-1] ** -0.5).bfloat16()
            torchs = weight.transpose(1, 2).contiguous().transpose(1, 2) if stored == "columns" else weight
            x = torch.randn(rows, *size[:-2], size[-1], generator=generator, device=device).bfloat16()
            return Call(lambda: kernels.linear(x, weight), lambda: linear(x, torchs), weight.nbytes)

        yield Row("linear", f"{name}, batch {rows}", rows, 2 * math.prod(size), make)


def tokens(rows: int, hidden: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, hidden, generator=generator, device=generator.device).bfloat16()


if __name__ == "__main__":
    sys.exit(main())
