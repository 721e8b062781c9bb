"""HOP-B on and off, on two GPUs: `python bench/hop.py [--only VARIANTS]`.

Decode steps as bench/decode.py runs them, `gen tp1 cp2`, with the rows in one group and in several. A variant is a
transport of the exchange and what is exchanged; its layouts differ in nothing but the groups. Only attention, exchange
and a dense FFN are run: DeepSeek-V3's dimensions, without experts. Without a GPU the same over gloo, on `--only tiny`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402

from bench.decode import STUDIES, K, Measured, Study, of_case, planned, run_ranks  # noqa: E402
from bench.gpu_timing import earlier_rows, machine  # noqa: E402
from helixc.plan.hop import layer  # noqa: E402
from helixc.spec.spec import Hardware  # noqa: E402
from helixc_runtime.manifest import Plan, Transport  # noqa: E402
from tests.deployments import role  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "hop.json"
V3 = Study("deepseek-v3", 8, ((8, 64 * K), (64, 8 * K), (128, 4 * K)), overrides=(("moe", None),))
TINY = replace(STUDIES["tiny"], cases=((4, 40), (3, 9)))


@dataclass(frozen=True)
class Variant:
    """A way to exchange, and the numbers of groups to compare; the first is 1."""

    study: Study
    transport: Transport
    space: str
    groups: tuple[int, ...] = (1, 2, 4)


VARIANTS = {
    "one-sided latents": Variant(V3, "one_sided", "latent"),
    "NCCL latents": Variant(V3, "collective", "latent"),
    "one-sided values": Variant(V3, "one_sided", "value", (1, 2)),
    "NCCL values": Variant(V3, "collective", "value", (1, 2)),
    "tiny": Variant(TINY, "collective", "value", (1, 2, 3)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the variants asked for and write the results. Returns 1 if one could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(n for n in VARIANTS if n != "tiny"), help="variants, by default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = machine() if on_gpu else {"gpu": "none", "versions": {"torch": torch.__version__}}
    names, failed = options.only.split(","), False
    result["rows"] = [row for row in earlier_rows(options.out, result) if row["variant"] not in names]
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            try:
                rows = list(measure(name, VARIANTS[name], Path(temporary), on_gpu))
            except RuntimeError as error:  # one variant must not stop the others
                failed = True
                print(f"{name}: {error}", flush=True)
                continue
        result["rows"] += rows
        result["rows"].sort(key=lambda row: list(VARIANTS).index(row["variant"]))  # stable
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        for row in rows:
            print(json.dumps(row), flush=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


def measure(name: str, variant: Variant, folder: Path, on_gpu: bool) -> Iterator[dict[str, Any]]:
    """The rows of one variant. Raises RuntimeError if a process fails or takes too long."""
    layouts = {
        f"{groups} groups": role(cp=2, exchange_space=variant.space, hop_groups=groups) for groups in variant.groups
    }
    study = replace(variant.study, layouts=layouts)
    with by(variant.transport):
        plans = {layout: planned(study, layout, folder / layout, on_gpu) for layout in layouts}
    run_ranks(study, folder, on_gpu, profile=False)
    found = {layout: json.loads((folder / f"{layout}.json").read_text())["cases"] for layout in layouts}
    one, *_ = layouts
    for batch, tokens in study.cases:
        for layout, groups in zip(layouts, variant.groups, strict=True):
            alone, measured = (of_case(found[of], batch, tokens) for of in (one, layout))
            assert alone and measured
            layers = plans[layout].model.arch.num_layers
            yield {
                "variant": name,
                "model": study.model,
                "layers": layers,
                "transport": variant.transport,
                "space": variant.space,
                "batch": batch,
                "tokens": tokens,
                "groups": groups,
                "step_us": round(measured.device, 1),
                "ttl_us": round(measured.ttl, 1),
                "saved_us": round(saved(alone, measured) / layers, 2),
                "estimated_us": round(estimated(plans[layout], variant, batch, tokens) * 1e6, 2),
            }


@contextmanager
def by(transport: Transport) -> Iterator[None]:
    """Plan for this transport."""
    before = os.environ.pop("HELIXC_COLLECTIVES", None)
    if transport == "collective":
        os.environ["HELIXC_COLLECTIVES"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HELIXC_COLLECTIVES", None)
        if before is not None:
            os.environ["HELIXC_COLLECTIVES"] = before


def saved(alone: Measured, measured: Measured) -> float:
    """Microseconds of a step."""
    return alone.device - measured.device


def estimated(plan: Plan, variant: Variant, batch: int, tokens: int) -> float:
    """Seconds that the groups of `plan` should save of a layer."""
    (rank, *_), hop = plan.ranks, plan.instances[0].hop
    with by(variant.transport):
        one = layer(role(cp=2), plan.model, rank.exchange_space, tokens, Hardware(None, 8, False))
    return one.seconds(batch) - one.seconds(batch, hop.groups, hop.processors)


if __name__ == "__main__":
    sys.exit(main())
