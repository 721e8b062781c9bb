"""One rank of a decode step alone on one GPU, its peers looped back: `python bench/rank.py [--only MODELS]`.

Rank 0 of `gen tp1 cp2` and of `gen tp2` runs the engine's decode loop as bench/decode.py has it. What it sends to the
other rank lands in its own memory, where the other's message is awaited (loopback.py): every kernel is that of a
deployment, but for NVLink, and its values are not the model's. What NVLink adds is estimated: exchanges and sums are
timed in loopback as bench/exchange.py times them between two GPUs, and each message of a step adds the difference to
that bench's results, by its size.

`--profile` prints which kernels a step's time goes to. Without a GPU it runs on `--only tiny`, without that estimate.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench import exchange  # noqa: E402
from bench.decode import (  # noqa: E402
    HELIX,
    LAYOUTS,
    PATIENCE_S,
    PLAIN,
    STUDIES,
    VLLM,
    Measured,
    Study,
    missed,
    of_case,
    planned,
    run_layout,
)
from bench.gpu_timing import copy_bandwidth, earlier_rows, first_gpu, machine  # noqa: E402
from bench.loopback import Loopback, alone, world_of_one  # noqa: E402
from bench.pair import Side, ops_of, pair_plan  # noqa: E402
from helixc_runtime.artifact import Artifact  # noqa: E402
from helixc_runtime.comm import Comm, Connection  # noqa: E402
from helixc_runtime.cubin import device_arch  # noqa: E402
from helixc_runtime.manifest import Rank  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "rank.json"
MOST_ROWS = 64  # of the messages whose cost is measured: a step's are smaller

Link = Mapping[str, list[tuple[int, float]]]  # what NVLink adds to "exchange" and "reduce": bytes, us; rising bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models asked for and write the results. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(n for n in STUDIES if n != "tiny"), help="models, by default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = first_gpu() if on_gpu else torch.device("cpu")
    result: dict[str, Any] = machine() if on_gpu else {"gpu": "none", "versions": {"torch": torch.__version__}}
    names, failures = options.only.split(","), []
    result["rows"] = [row for row in earlier_rows(options.out, result) if row["model"] not in names]
    with torch.inference_mode(), world_of_one() as connection:
        link = link_of(device) if on_gpu else {}
        for name in names:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as temporary:
                try:
                    bench = Bench(Path(temporary), device, connection, options.profile)
                    rows = list(bench.rows(name, STUDIES[name], link))
                except RuntimeError as error:  # one model must not stop the others
                    failures.append(f"{name}: {error}")
                    print(failures[-1], flush=True)
                    continue
            result["rows"] += rows
            result["rows"].sort(key=lambda row: list(STUDIES).index(row["model"]))  # stable
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(*map(json.dumps, rows), sep="\n")
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failures else 0


@dataclass(frozen=True)
class Found:
    """What was measured of one layout, and what its rank sends in a step."""

    layers: int
    cases: list[dict[str, Any]]
    comm: Comm

    def estimate(self, measured: Measured, batch: int, link: Link) -> float:
        """Microseconds of a step between two GPUs."""
        sent = self.comm.messages(batch) if isinstance(self.comm, Loopback) else []
        return measured.ttl + sum(count * added(link, what, size) for what, size, count in sent)


@dataclass(frozen=True)
class Bench:
    """Runs the models."""

    folder: Path
    device: torch.device
    connection: Connection
    profile: bool

    def rows(self, name: str, study: Study, link: Link) -> Iterator[dict[str, Any]]:
        """Of one model: HELIX, with PLAIN beside it."""
        found = {layout: self.run(study, layout) for layout in LAYOUTS}
        bandwidth = copy_bandwidth(self.device) if self.device.type == "cuda" else math.inf
        for batch, tokens in study.cases:
            helix, plain = (of_case(found[layout].cases, batch, tokens) for layout in LAYOUTS)
            if helix is None:
                continue
            estimate = found[HELIX].estimate(helix, batch, link)
            plain_estimate = plain and found[PLAIN].estimate(plain, batch, link)
            floor_us = helix.floor_bytes / bandwidth * 1e6
            vllm_us, _ = VLLM.get((batch, tokens), (None, None)) if name == "deepseek-v3-lite" else (None, None)
            row = {
                "model": name,
                "layers": found[HELIX].layers,
                "batch": batch,
                "tokens": tokens,
                "rank_us": round(helix.ttl, 1),
                "host_us": round(helix.ttl - helix.device, 1),
                "estimate_us": round(estimate, 1),
                "floor_us": round(floor_us, 1),
                "floor_share": round(floor_us / estimate, 3),
                "tp2_rank_us": plain and round(plain.ttl, 1),
                "tp2_estimate_us": plain_estimate and round(plain_estimate, 1),
                "ratio": plain_estimate and round(plain_estimate / estimate, 3),
                "vllm_us": vllm_us,
            }
            yield row | {"missed": list(missed(row | {"ttl_us": row["estimate_us"]}))}

    def run(self, study: Study, layout: str) -> Found:
        """Rank 0 of one layout."""
        plan = planned(study, layout, self.folder / layout, self.device.type == "cuda")
        comms: list[Comm] = []

        def meet(artifact: Artifact, rank: Rank, device: torch.device) -> tuple[Connection, Comm]:
            comms.append(alone(artifact, rank, device, PATIENCE_S))
            return self.connection, comms[-1]

        cases = list(run_layout(study, self.folder / layout, 0, self.device, self.profile, meet))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Found(plan.model.arch.num_layers, cases, comms[0])


# --- What NVLink adds -------------------------------------------------------------------------------------------


def link_of(device: torch.device) -> Link:
    """The times between two GPUs less those in loopback."""
    link: dict[str, list[tuple[int, float]]] = {"exchange": [], "reduce": []}
    between_two = json.loads(exchange.RESULTS.read_text())["rows"]
    for model, hidden in exchange.MODELS.items():
        with tempfile.TemporaryDirectory() as temporary:
            side, comm = lone_side(model, Path(temporary), device)
            for row in between_two:
                if row["rows"] > MOST_ROWS or not of_model(row, side, hidden):
                    continue
                calls = (exchange.exchanges if row["op"] == "exchange" else exchange.reductions)(side, row["rows"])
                here = exchange.medians(side, {"ours": calls["ours"]})["ours_us"]
                sizes = {what: size for what, size, _ in comm.messages(row["rows"])}
                link[row["op"]].append((sizes[row["op"]], row["ours_us"] - here))
                print(
                    f"{row['op']}, {row['rows']} rows of {model}: {row['ours_us']} us, in loopback {here}", flush=True
                )
    return {op: sorted(points) for op, points in link.items()}


def of_model(row: Mapping[str, Any], side: Side, hidden: int) -> bool:
    """Whether a row of bench/exchange.py is one of this model's."""
    if row["op"] == "exchange":
        return bool(row["heads"] == side.ops.shape.heads)
    return bool(row["op"] == "reduce" and row["hidden"] == hidden)


def lone_side(model: str, folder: Path, device: torch.device) -> tuple[Side, Loopback]:
    """Rank 0 of bench/exchange.py's two, looped back."""
    plan = pair_plan(model, folder, device_arch(device), max(exchange.REDUCE_ROWS))
    comm = Loopback(plan.ranks[0], {}, plan.instances[0], plan.kernels, folder, device, PATIENCE_S)
    return Side(0, plan, folder, comm, ops_of(plan, 0, folder, device), device, seed=0), comm


def added(link: Link, what: str, size: int) -> float:
    """Microseconds that NVLink adds to a message of `size` bytes: between what was measured, the ends beyond.

    The largest logits of two ranks are as small as a sum can be.
    """
    sizes, us = zip(*link["exchange" if what == "exchange" else "reduce"], strict=True)
    return float(np.interp(size, sizes, us))


if __name__ == "__main__":
    sys.exit(main())
