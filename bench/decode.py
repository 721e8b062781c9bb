"""Whole decode steps on two GPUs, Helix against tensor parallelism: `python bench/decode.py [--only MODELS]`.

Each model is planned and compiled twice, as `gen tp1 cp2` and as `gen tp2`, and run by two processes through the
engine's own decode loop, on random weights and a KV pool of random numbers, pages in random order: nothing is
prefilled. TTL is the median time between two steps of that loop. What the GPU takes for each of them is measured by
events; the difference is host time that the GPU waits for. The floor is the bytes that a rank must read, its weights
(of the experts as many as the batch is expected to choose) and its KV, at the speed of torch's copy in the same run.

`--profile` prints which kernels a step's time goes to. `--layouts tp1` runs the step on one GPU alone: what it prints
is for finding where the time goes, and no result. Without a GPU the same runs over gloo, on `--only tiny`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # noqa: E402

from bench.gpu_timing import copy_bandwidth, earlier_rows, machine  # noqa: E402
from helixc.build import build, build_without_kernels, make_plan  # noqa: E402
from helixc.hardware import GPUS  # noqa: E402
from helixc.launch.host import free_port  # noqa: E402
from helixc.model import read_model  # noqa: E402
from helixc.spec.spec import RoleSpec  # noqa: E402
from helixc_runtime.artifact import Artifact, load  # noqa: E402
from helixc_runtime.comm import Comm, Connection, connect  # noqa: E402
from helixc_runtime.engine import Generation, Session, load_decoder, make_comm, make_ops  # noqa: E402
from helixc_runtime.events import Emitter  # noqa: E402
from helixc_runtime.job import Job, Request  # noqa: E402
from helixc_runtime.kv import KvCache, pages_needed  # noqa: E402
from helixc_runtime.manifest import DTYPE_BYTES, ModelArch, Plan, Rank, local_length  # noqa: E402
from helixc_runtime.scheduler import Scheduler, new_row  # noqa: E402
from helixc_runtime.step import DecodeStep, RowInput, StepResult  # noqa: E402
from tests.deployments import role, spec  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "decode.json"
K, M = 1024, 1 << 20
BLOCK = 64
POOL_BYTES = 80e9  # what a rank's KV may take; a layout whose share of a case is larger does not fit
WARM_STEPS, STEPS, PROFILED = 8, 48, 4
MOST_KERNELS = 45  # of a profile
DEADLINE_S = 240.0  # for one model
PATIENCE_S = 60.0  # for a message of a peer
LAYOUTS = {"tp1 cp2": role(cp=2), "tp2": role(tp=2)}
HELIX, PLAIN = LAYOUTS
ALONE = {"tp1": role()}


# How a rank meets the others: what it shares with them, and its Comm.
Meet = Callable[[Artifact, Rank, torch.device], tuple[Connection, Comm]]


@dataclass(frozen=True)
class Study:
    """A model, cut to `layers` (None: whole) of which one is dense if it has experts, and its cases."""

    model: str
    layers: int | None
    cases: tuple[tuple[int, int], ...]  # (batch, tokens cached of each row)
    block: int = BLOCK
    overrides: tuple[tuple[str, Any], ...] = ()  # of ModelArch
    layouts: dict[str, RoleSpec] = field(default_factory=lambda: LAYOUTS)


LENGTHS = (8 * K, 64 * K, 256 * K, M)
STUDIES = {
    "deepseek-v3-lite": Study(
        "deepseek-v3-lite", None, (*((b, n) for b in (1, 8) for n in LENGTHS if b * n < 8 * M), (4, M))
    ),
    "deepseek-v3": Study("deepseek-v3", 5, tuple((b, n) for b in (1, 8) for n in LENGTHS)),
    "llama-3.1-70b": Study("llama-3.1-70b", 16, tuple((b, n) for b in (1, 8) for n in LENGTHS if b * n <= 2 * M)),
    "tiny": Study(
        "tinyllama-1.1b",
        2,
        ((1, 40), (3, 9)),
        block=4,
        overrides=(("hidden_size", 64), ("intermediate_size", 96), ("vocab_size", 100), ("num_heads", 4)),
    ),
}


# vLLM 0.26 on two H200s on 2026-11-22, DeepSeek-V2-Lite's dimensions, random weights: its step cadence in us, the best
# of `-tp 2` and `-tp 2 -dcp 2` (all-to-all), each with FlashAttention-3's split cap at 32 and at 128. And the goal.
VLLM = {
    (1, 8 * K): (3340, 2.0),
    (1, 64 * K): (3870, 2.0),
    (1, 256 * K): (5250, 1.8),
    (1, M): (7980, 1.4),
    (8, 8 * K): (4000, None),
    (8, 64 * K): (6530, 1.25),
    (8, 256 * K): (12300, 1.08),
    (4, M): (20200, 1.08),
}


@dataclass(frozen=True)
class Measured:
    """One case in one layout, on the slower rank. Times in microseconds."""

    ttl: float
    device: float  # of the step alone
    floor_bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models asked for and write the results. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(n for n in STUDIES if n != "tiny"), help="models, by default all")
    parser.add_argument("--layouts", choices=["compared", *ALONE], default="compared")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = machine() if on_gpu else {"gpu": "none", "versions": {"torch": torch.__version__}}
    names, failures = options.only.split(","), []
    result["rows"] = [row for row in earlier_rows(options.out, result) if row["model"] not in names]
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            try:
                study = replace(STUDIES[name], layouts=LAYOUTS if options.layouts == "compared" else ALONE)
                found = measure(name, study, Path(temporary), on_gpu, options.profile)
            except RuntimeError as error:  # one model must not stop the others
                failures.append(f"{name}: {error}")
                print(failures[-1], flush=True)
                continue
        if study.layouts is ALONE:
            continue
        rows = list(compared(name, STUDIES[name], found))
        result["rows"] += rows
        result["rows"].sort(key=lambda row: list(STUDIES).index(row["model"]))  # stable
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        for row in rows:
            print(json.dumps(row), *(f"MISSED: {flaw}" for flaw in missed(row)), flush=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failures else 0


@dataclass(frozen=True)
class Found:
    """What was measured of one layout."""

    plan: Plan
    cases: list[dict[str, Any]]  # of all ranks
    bandwidth: float  # of the slower GPU, bytes a second


def measure(name: str, study: Study, folder: Path, on_gpu: bool, profile: bool) -> dict[str, Found]:
    """Each layout of one model; all have the same number of ranks. RuntimeError if a process fails or is too slow."""
    plans = {}
    for layout in study.layouts:
        plans[layout] = planned(study, layout, folder / layout, on_gpu)
        print(f"{name}, gen {layout}: KV capacity {capacity(plans[layout]):,} tokens of one H200 a rank", flush=True)
    run_ranks(study, folder, on_gpu, profile)
    return {
        layout: Found(plans[layout], **json.loads((folder / f"{layout}.json").read_text())) for layout in study.layouts
    }


def compared(name: str, study: Study, found: Mapping[str, Found]) -> Iterator[dict[str, Any]]:
    """The rows of one model: HELIX, with PLAIN beside it."""
    plans = {layout: found[layout].plan for layout in LAYOUTS}
    bandwidth = found[HELIX].bandwidth
    for batch, tokens in study.cases:
        helix, plain = (of_case(found[layout].cases, batch, tokens) for layout in LAYOUTS)
        if helix is None:
            continue
        floor_us = helix.floor_bytes / bandwidth * 1e6
        vllm_us, _ = VLLM.get((batch, tokens), (None, None)) if name == "deepseek-v3-lite" else (None, None)
        yield {
            "model": name,
            "layers": plans[HELIX].model.arch.num_layers,
            "batch": batch,
            "tokens": tokens,
            "ttl_us": round(helix.ttl, 1),
            "tp2_ttl_us": plain and round(plain.ttl, 1),
            "ratio": plain and round(plain.ttl / helix.ttl, 3),
            "floor_us": round(floor_us, 1),
            "floor_share": round(floor_us / helix.ttl, 3),
            "tp2_floor_us": plain and round(plain.floor_bytes / bandwidth * 1e6, 1),
            "host_us": round(helix.ttl - helix.device, 1),
            "tp2_host_us": plain and round(plain.ttl - plain.device, 1),
            "vllm_us": vllm_us,
            "kv_capacity_ratio": round(capacity(plans[HELIX]) / capacity(plans[PLAIN]), 3),
        }


def missed(row: dict[str, Any]) -> Iterator[str]:
    """The goals that a row misses."""
    model, batch, tokens = row["model"], row["batch"], row["tokens"]
    least = {
        "deepseek-v3-lite": {(1, 8 * K): 1.0, (8, 8 * K): 1.0, (1, M): 1.7, (8, 256 * K): 1.7}.get((batch, tokens)),
        "deepseek-v3": 1.2 if tokens == M else None,
        "llama-3.1-70b": 0.97,
    }.get(model)
    if least and row["ratio"] and row["ratio"] < least:
        yield f"{row['ratio']} of tp2, goal {least}"
    if model == "deepseek-v3-lite" and tokens >= 256 * K and row["floor_share"] < 0.7:
        yield f"{row['floor_share']:.0%} of the floor, goal 70%"
    if row["vllm_us"] and (goal := VLLM[batch, tokens][1]) and row["vllm_us"] / row["ttl_us"] < goal:
        yield f"{row['vllm_us'] / row['ttl_us']:.2f} of vLLM, goal {goal}"
    if row["host_us"] > 0.03 * row["ttl_us"]:
        yield f"{row['host_us'] / row['ttl_us']:.1%} host time, goal 3%"


def of_case(cases: list[dict[str, Any]], batch: int, tokens: int) -> Measured | None:
    """What was measured of a case, the slower rank's; None if it did not fit."""
    same = [Measured(**case["measured"]) for case in cases if (case["batch"], case["tokens"]) == (batch, tokens)]
    return max(same, key=lambda m: m.ttl) if same else None


# --- What is measured -------------------------------------------------------------------------------------------


def planned(study: Study, layout: str, artifact: Path, on_gpu: bool) -> Plan:
    """The study's plan for a layout, written as an artifact."""
    arch = read_model(study.model)
    if study.layers is not None:
        moe = replace(arch.moe, layers=tuple(range(1, study.layers))) if arch.moe else None
        arch = replace(arch, num_layers=study.layers, moe=moe)
    arch = replace(arch, max_position=2 * M, **dict(study.overrides))
    batch, length = (max(values) for values in zip(*study.cases, strict=True))
    generation = replace(
        study.layouts[layout], max_batch_size=batch, max_seq_len=total(length), tokens_per_block=study.block
    )
    cp = generation.context_parallel_size
    held = [batch * local_length(total(n), study.block, cp, 0) for batch, n in fitting(study, arch, layout)]
    pool = (max(held) // study.block + 8) * study.block  # a page is reserved whole
    deployment = spec(
        study.model,
        None,
        replace(generation, max_tokens=pool),
        load_format="dummy",
        dtype="bfloat16" if on_gpu else "float32",
    )
    if not on_gpu:
        return build_without_kernels(deployment, arch, "", artifact)
    return build(make_plan(deployment, arch, ("sm_90a",)), ("sm_90a",), "", artifact).plan


def total(tokens: int) -> int:
    """The tokens that a row starts with, and those of all steps."""
    return tokens + generated()


def generated() -> int:
    """The tokens of a row: the first is not a step's."""
    return 1 + WARM_STEPS + STEPS + PROFILED


def fitting(study: Study, arch: ModelArch, layout: str) -> list[tuple[int, int]]:
    """The cases whose KV a rank of the layout can hold."""
    sizes = study.layouts[layout]
    tp, cp = sizes.tensor_parallel_size, sizes.context_parallel_size
    heads = 1 if arch.mla else arch.num_kv_heads // tp
    token = arch.kv_bytes("bfloat16") * heads * arch.num_layers
    return [(batch, n) for batch, n in study.cases if batch * local_length(n, study.block, cp, 0) * token <= POOL_BYTES]


def capacity(plan: Plan) -> int:
    """Tokens that the instance could hold if each rank had an H200 to itself."""
    memory, instance = plan.ranks[0].memory, plan.instances[0]
    room = (GPUS["h200"].memory - memory.weights - memory.workspace) * instance.free_gpu_memory_fraction
    return int(room // memory.kv_per_token) * instance.cp


def floor_bytes(plan: Plan, rank: Rank, batch: int, tokens: int) -> float:
    """Bytes that `rank` has to read for one step of `batch` rows with `tokens` cached each."""
    weights = 0.0
    for piece in plan.shards[rank.shard]:
        size = math.prod(hi - lo for lo, hi in piece.box) * DTYPE_BYTES[plan.model.dtype]
        size *= len(piece.layers) if piece.layers is not None else 1
        if piece.experts is not None:
            assert plan.model.arch.moe
            missed = 1 - plan.model.arch.moe.top_k / plan.model.arch.moe.experts
            size *= (piece.experts[1] - piece.experts[0]) * (1 - missed**batch)
        if piece.name != "embed":  # of which a row each is read
            weights += size
    layers, heads = rank.layers[1] - rank.layers[0], rank.kv_heads[1] - rank.kv_heads[0]
    cached = local_length(tokens, plan.tokens_per_block, len(rank.groups.cp), rank.cp_rank)
    return weights + batch * cached * layers * heads * plan.model.kv_bytes


# --- A process a rank -------------------------------------------------------------------------------------------


def world(sizes: RoleSpec) -> int:
    """Ranks of a layout."""
    return sizes.tensor_parallel_size * sizes.context_parallel_size


def run_ranks(study: Study, folder: Path, on_gpu: bool, profile: bool) -> None:
    """The layouts, all of as many ranks, one after the other, by a process a rank; LAYOUT.json comes into `folder`."""
    context, ports = multiprocessing.get_context("spawn"), [free_port() for _ in study.layouts]
    count = max(world(sizes) for sizes in study.layouts.values())
    ranks = [context.Process(target=run_rank, args=(study, folder, on_gpu, profile, r, ports)) for r in range(count)]
    deadline = time.monotonic() + DEADLINE_S
    for process in ranks:
        process.start()
    try:
        while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {DEADLINE_S:g} s")
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    if codes := [process.exitcode for process in ranks if process.exitcode]:
        raise RuntimeError(f"a process ended with {codes[0]}; its traceback is above")


def run_rank(study: Study, folder: Path, on_gpu: bool, profile: bool, rank: int, ports: Sequence[int]) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    for layout, port in zip(study.layouts, ports, strict=True):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        with torch.inference_mode():
            cases = list(run_layout(study, folder / layout, rank, device, profile))
            bandwidth = copy_bandwidth(device) if on_gpu else math.inf
        ranks: list[Any] = [None] * world(study.layouts[layout])
        dist.all_gather_object(ranks, (cases, bandwidth))
        if rank == 0:
            found = {"cases": [case for of_rank, _ in ranks for case in of_rank], "bandwidth": min(b for _, b in ranks)}
            (folder / f"{layout}.json").write_text(json.dumps(found))
        dist.destroy_process_group()
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()


def with_peers(artifact: Artifact, rank: Rank, device: torch.device) -> tuple[Connection, Comm]:
    """The other processes, and what the plan chose to send by."""
    connection = connect(artifact.plan, rank, device, timedelta(seconds=DEADLINE_S))
    return connection, make_comm(artifact, rank, connection, device, PATIENCE_S)


def run_layout(
    study: Study, directory: Path, rank: int, device: torch.device, profile: bool, meet: Meet = with_peers
) -> Iterator[dict[str, Any]]:
    """Every case of one layout."""
    artifact, start = load(directory), time.monotonic()
    plan, own, instance = artifact.plan, artifact.plan.ranks[rank], artifact.plan.instances[0]
    cases = fitting(study, plan.model.arch, directory.name)
    requests = [
        Request(index, (0,) * tokens, generated(), 0.0, 1.0, 0, True)
        for index, (batch, tokens) in enumerate((batch, tokens) for batch, tokens in cases for _ in range(batch))
    ]
    job = Job(str(directory), None, "cuda" if device.type == "cuda" else "cpu", tuple(requests), False, PATIENCE_S, 1)
    with Path(os.devnull).open("wb") as silent:
        emit = Emitter(silent.fileno(), rank)
        connection, comm = meet(artifact, own, device)
        decoder = load_decoder(plan, own, comm, device, emit)
        session = Session(job, plan, own, instance, decoder, connection, directory, emit)
        width = pages_needed(instance.max_seq_len, study.block, instance.cp)
        cache = KvCache(plan.model, own, study.block, instance.max_batch_size, width, device)
        for pool in (pool for layer in cache.layers for pool in (layer.k, layer.v) if pool is not None):
            pool.normal_()
        generation = Generation(
            session, make_ops(artifact, own, device, emit), cache, Scheduler(plan, instance, requests, cache.free_pages)
        )
        generation.step.capture(sampled=False)
        say(rank, f"{directory.name}: ready after {time.monotonic() - start:.1f} s")
        for batch, tokens in cases:
            for slot in range(batch):
                request = generation.scheduler.waiting[0]
                generation.scheduler.admit(request)
                row = new_row(request, slot, first_token=slot)
                cache.reserve(row)
                generation.join(row)
            shuffle_pages(cache, batch)
            measured, kernels = measure_case(generation, floor_bytes(plan, own, batch, tokens), profile)
            say(rank, f"{directory.name}: {batch} x {tokens}: {measured}{kernels}")
            yield {"batch": batch, "tokens": tokens, "measured": asdict(measured)}


def shuffle_pages(cache: KvCache, batch: int) -> None:
    """Let the rows have random pages of the whole pool, in random order."""
    pages = torch.randperm(len(cache.layers[0].k), device=cache.device, dtype=torch.int32)
    width = min(len(pages) // batch, cache.table.shape[1])
    cache.table[:batch, :width] = pages[: batch * width].view(batch, width)


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


class Timed:
    """A DecodeStep that notes how long the device takes for each step, without waiting for it."""

    def __init__(self, step: DecodeStep) -> None:
        self._step, self._on_gpu = step, step.decoder.device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def assign(self, rows: Sequence[RowInput]) -> None:
        self._step.assign(rows)

    def __call__(self) -> StepResult | None:
        start = self._now()
        result = self._step()
        self._marks.append((start, self._now()))
        return result

    def median_us(self) -> float:
        """Of all steps so far."""
        if not self._on_gpu:
            return statistics.median(end - start for start, end in self._marks) * 1e6
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in self._marks) * 1e3

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measure_case(generation: Generation, read: float, profile: bool) -> tuple[Measured, str]:
    """Time the rows that `generation` has, until they end; `read`: see floor_bytes.

    And what else there is to say: the profile, if wanted, and whether rows have come to the same tokens, and experts.
    """
    rows = list(generation.rows)
    for _ in range(WARM_STEPS):
        generation.advance()
    step, timed = generation.step, Timed(generation.step)
    generation.step = cast(DecodeStep, timed)
    times = [time.perf_counter()]
    for _ in range(STEPS):
        generation.advance()
        times.append(time.perf_counter())
    generation.step = step
    ttl = statistics.median(after - before for before, after in itertools.pairwise(times)) * 1e6
    kernels = profiled(generation) if profile else ""
    while generation.rows:
        generation.advance()
    distinct = statistics.mean(len(set(tokens)) for tokens in zip(*(row.tokens for row in rows), strict=True))
    said = f", {distinct:.1f} different tokens a step" if len(rows) > 1 else ""
    return Measured(ttl, timed.median_us(), read), said + kernels


def profiled(generation: Generation) -> str:
    """A line a kernel, those first that cost a step the most."""
    on_gpu = generation.step.decoder.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(PROFILED):
            generation.advance()
        if on_gpu:
            torch.cuda.synchronize()
    rows = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    moved = ends_moved(profiler.events()) if on_gpu else {}
    order = sorted(rows, key=lambda name: moved.get(name, rows[name][0]), reverse=True)
    lines = ["", "us a launch, launches and us of a step, us by which the step ends later: of its kernels"]
    totals = (sum(count for _, count in rows.values()), sum(us for us, _ in rows.values()), sum(moved.values()))
    lines.append(f"{'all':>9} {totals[0] / PROFILED:7.1f} {totals[1] / PROFILED:9.1f} {totals[2] / PROFILED:9.1f}")
    for name in order[:MOST_KERNELS]:
        us, count = rows[name]
        if us:
            times = f"{us / count:9.2f} {count / PROFILED:7.1f} {us / PROFILED:9.1f}"
            lines.append(f"{times} {moved.get(name, 0.0) / PROFILED:9.1f}  {name[:110]}")
    return "\n".join(lines)


def ends_moved(events: Sequence[Any]) -> dict[str, float]:
    """By kernel: microseconds from the end of what ended before to its own. Kernels overlap; these times do not."""
    moved: dict[str, float] = {}
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    on_device.sort(key=lambda event: event.time_range.end)
    for before, event in itertools.pairwise(on_device):
        moved[event.name] = moved.get(event.name, 0.0) + event.time_range.end - before.time_range.end
    return moved


if __name__ == "__main__":
    sys.exit(main())
