"""Compile a built-in geometry with random weights on the GPU machine, and launch it with --verify."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helixc.artifact import write
from helixc.codegen.build import compile_all, render_all
from helixc.codegen.select import names_for, select
from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place, with_kernels
from helixc.plan.verify import verify
from helixc.spec.spec import Hardware, RoleSpec
from tests.deployments import on_gpus, spec


def compiled(
    directory: Path,
    model: str,
    layers: int | None,
    dtype: str,
    context: RoleSpec,
    generation: RoleSpec,
    gpus: int | None = None,
    max_seq_len: int = 1024,
) -> Path:
    """An artifact of a built-in geometry with random weights, cut to `layers`, 16 experts and 1000 words.

    For `gpus` GPUs, by default those of this machine: see on_gpus.
    """
    arch = read_model(model)
    if layers is not None:
        moe = arch.moe and replace(arch.moe, experts=16, layers=tuple(i for i in arch.moe.layers if i < layers))
        arch = replace(arch, num_layers=layers, moe=moe, vocab_size=1000)
    fields: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": dtype,
        "hardware": Hardware(1, 2, True),
    }
    context, generation = (replace(role, max_seq_len=max_seq_len) for role in (context, generation))
    plan = place(lower(spec(model, context, generation, **fields), arch), partial(names_for, ("sm_90a",)))
    verify(plan)
    plan = on_gpus(plan, gpus or torch.cuda.device_count())
    cubins = compile_all(render_all(select(plan, ("sm_90a",))))
    plan = with_kernels(plan, tuple(cubin.kernel() for cubin in cubins))
    write(directory, plan, "", {cubin.directory.name: cubin.directory for cubin in cubins}, nvrtc=None)
    return directory


def launch(
    artifact: Path,
    lengths: list[int],
    max_tokens: int,
    directory: Path,
    seed: int,
    *options: str,
    **switches: str,
) -> dict[str, Any]:
    """The JSON object of `helixc launch` with `options` and `switches` on prompts drawn from `seed`."""
    directory.mkdir(parents=True, exist_ok=True)
    pick = random.Random(seed)
    prompts = [{"token_ids": [pick.randrange(1000) for _ in range(n)], "ignore_eos": True} for n in lengths]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    command = [sys.executable, "-m", "helixc", "launch", str(artifact), "--device", "cuda", "--format", "json"]
    command += ["--prompts", str(directory / "prompts.jsonl"), "--max-tokens", str(max_tokens), *options]
    command += ["--run-dir", str(directory / "run")]
    environment = os.environ | switches
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    print(done.stderr[-4000:])
    assert done.returncode == 0, f"{seed=}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(result.get("verify")), json.dumps(result["metrics"]))
    assert all(len(r["token_ids"]) == max_tokens for r in result["requests"])
    return result
