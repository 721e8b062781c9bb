"""Handoff of a prompt's KV, between peers and through the host: `python bench/handoff.py [--out FILE]`.

Two processes, on two GPUs where there are two, else on one: a context rank and one of two generation ranks, with the
runtime's own two ends of the handoff. A time is that of the receiver, from the request until all lies in its pages,
what is told and replied included; medians, both ways in turn. What lies in the pages must be the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu_timing import machine  # noqa: E402
from bench.pair import start_pair  # noqa: E402
from helixc.codegen.build import compile_all, render_all  # noqa: E402
from helixc.codegen.problem import handoff  # noqa: E402
from helixc_runtime.cubin import device_arch  # noqa: E402
from helixc_runtime.handoff import DistTransport, Outbox, receive  # noqa: E402
from helixc_runtime.job import Request  # noqa: E402
from helixc_runtime.kv import KvCache, Row  # noqa: E402
from helixc_runtime.manifest import Handoff, Plan, local_length  # noqa: E402
from helixc_runtime.page_writer import CudaPageWriter, PageKernel  # noqa: E402
from tests.deployments import plan_of, role  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "handoff.json"
CASES = [("deepseek-v3", "auto"), ("deepseek-v3", "fp8"), ("llama-3.1-8b", "auto"), ("llama-3.1-8b", "fp8")]
TOKENS = (1024, 8192, 32768)
REPEATS: dict[Handoff, int] = {"peer": 9, "host": 3}
PATIENCE_S, DEADLINE_S, BLOCK = 30.0, 60.0, 64
WAYS: tuple[Handoff, ...] = ("peer", "host")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    gpus = min(2, torch.cuda.device_count())
    result: dict[str, Any] = {**machine(), "gpus": gpus, "copy_gb_s": copy_bandwidth(gpus), "rows": []}
    for row in measure(CASES, TOKENS, REPEATS, gpus, random.randrange(1 << 30)):
        print(row, flush=True)
        result["rows"].append(row)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def copy_bandwidth(gpus: int) -> float:
    """10^9 bytes a second of torch's copy from the sender's GPU to the receiver's."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=f"cuda:{i}") for i in (0, gpus - 1))
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        target.copy_(source)
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))  # type: ignore[no-untyped-call]
    return round((1 << 30) / statistics.median(times) / 1e6, 1)


def measure(
    cases: Sequence[tuple[str, Any]], lengths: Sequence[int], repeats: dict[Handoff, int], gpus: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each case, (model, kv_dtype), and prompt length, as they come.

    Raises RuntimeError if a process fails or the two ways leave other bytes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plans = [compiled(*case, max(lengths) + BLOCK, folder) for case in cases]
        pipes, processes = start_pair(_process, plans, folder, lengths, repeats, gpus, seed)
        try:
            yield from _rows(pipes, seed)
        finally:
            for process in processes:
                process.kill()
                process.join()


def compiled(model: str, kv_dtype: Any, tokens: int, folder: Path) -> Plan:
    """`ctx tp1 / gen tp1 cp2` on one host, of which only the first generation rank takes part."""
    roles = role(kv_dtype=kv_dtype), role(cp=2, block=BLOCK, batch=1, max_seq_len=tokens, kv_dtype=kv_dtype)
    plan = plan_of(model, *roles, dtype="bfloat16")
    specs = [handoff(plan.model, BLOCK, device_arch(torch.device("cuda", 0)))]
    kernels = []
    for cubin in compile_all(render_all(specs)):
        shutil.copytree(cubin.directory, folder / "kernels" / cubin.directory.name, dirs_exist_ok=True)
        kernels.append(cubin.kernel())
    return replace(plan, kernels=tuple(kernels), transfers=tuple(t for t in plan.transfers if t.target == 0))


def _rows(pipes: Sequence[Connection], seed: int) -> Iterator[dict[str, Any]]:
    """What both processes tell until they are done. Raises RuntimeError for the first that fails."""
    waiting = list(pipes)
    while waiting:
        ready = wait(waiting, DEADLINE_S)
        if not ready:
            raise RuntimeError(f"nothing new for {DEADLINE_S:g} s, {seed=}")
        for pipe in (pipe for pipe in pipes if pipe in ready):
            how, told = pipe.recv()
            if how == "failed":
                raise RuntimeError(f"{seed=}\n{told}")
            if how == "row":
                yield told
            else:
                waiting.remove(pipe)


def _process(
    index: int,
    port: int,
    plans: Sequence[Plan],
    folder: Path,
    lengths: Sequence[int],
    repeats: dict[Handoff, int],
    gpus: int,
    seed: int,
    pipe: Connection,
) -> None:
    try:
        device = torch.device("cuda", index % gpus)
        torch.cuda.set_device(device)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
        with torch.inference_mode():
            for plan in plans:
                if index == 0:
                    _send(plan, folder, lengths, repeats, device, seed)
                else:
                    _receive(plan, lengths, repeats, device, pipe)
                torch.cuda.synchronize(device)
                dist.barrier()
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)


def _by_way(plan: Plan, way: Handoff) -> Plan:
    return replace(plan, instances=(replace(plan.instances[0], handoff=way), *plan.instances[1:]))


def _request(length: int) -> Request:
    return Request(0, (0,) * length, 1, 0.0, 1.0, 0, True)


class _Nobody:
    def emit(self, event: str, **fields: Any) -> None: ...


def _send(
    plan: Plan, folder: Path, lengths: Sequence[int], repeats: dict[Handoff, int], device: torch.device, seed: int
) -> None:
    arch, rank, told = plan.model.arch, plan.ranks[0], [""]
    dist.broadcast_object_list(told, 1)
    writer = CudaPageWriter(PageKernel(plan, rank, plan.kernels, folder, device), device, lambda _: told[0])
    emit: Any = _Nobody()
    boxes = {way: Outbox(_by_way(plan, way), rank, DistTransport(), writer, emit, PATIENCE_S) for way in WAYS}
    generator = torch.Generator(device).manual_seed(seed)
    for length in lengths:
        size = (length, arch.head_dim) if arch.mla else (2, length, arch.num_kv_heads, arch.head_dim)
        drawn = [
            torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(arch.num_layers)
        ]
        cached = drawn if arch.mla else [kv.transpose(1, 2) for kv in drawn]
        for way in _order(repeats):
            torch.cuda.synchronize(device)
            dist.barrier()
            boxes[way].send(_request(length), cached)
            boxes[way].settle()


def _receive(
    plan: Plan, lengths: Sequence[int], repeats: dict[Handoff, int], device: torch.device, pipe: Connection
) -> None:
    rank, cp = plan.ranks[1], plan.instances[1].cp
    cache = KvCache(plan.model, rank, BLOCK, 1, plan.most_pages(plan.instances[1]), device, shared=True)
    dist.broadcast_object_list([cache.arena.handle()], 1)
    random.shuffle(cache._free)
    for length in lengths:
        row, request = Row(0, 0, length, 1), _request(length)
        cache.reserve(row)
        times: dict[Handoff, list[float]] = {way: [] for way in WAYS}
        left: dict[Handoff, Tensor] = {}
        for way in _order(repeats):
            cache.arena.memory.fill_(255)
            torch.cuda.synchronize(device)
            dist.barrier()
            begin = time.monotonic()
            receive(_by_way(plan, way), rank, request, row, cache, DistTransport(), PATIENCE_S)
            torch.cuda.synchronize(device)
            times[way].append(time.monotonic() - begin)
            if way not in left:
                left[way] = cache.arena.memory.clone()
        if not torch.equal(left["peer"], left["host"]):
            raise RuntimeError(f"the two ways leave other bytes for {length} tokens")
        cache.release(row)
        owned = local_length(length, BLOCK, cp, 0)
        size = owned * rank.memory.kv_per_token
        seconds = {way: statistics.median(found[1:] or found) for way, found in times.items()}  # the first maps
        milliseconds = {f"{way}_ms": round(1e3 * s, 3) for way, s in seconds.items()}
        cached = {"model": plan.model.name, "kv_dtype": plan.model.kv_dtype}
        pipe.send(("row", {**cached, "tokens": length, "bytes": size, **milliseconds}))


def _order(repeats: dict[Handoff, int]) -> list[Handoff]:
    """Both ways in turn, as far as each goes."""
    return [way for i in range(max(repeats.values())) for way in WAYS if i < repeats[way]]


if __name__ == "__main__":
    sys.exit(main())
