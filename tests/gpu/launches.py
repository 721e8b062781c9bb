"""Compile a built-in geometry with random weights on the GPU machine, and launch it with --verify."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from helixc.artifact import write
from helixc.codegen.build import compile_all, render_all
from helixc.codegen.select import names_for, select
from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place, with_kernels
from helixc.plan.verify import verify
from helixc.spec.spec import Hardware, RoleSpec
from tests.deployments import spec


def compiled(
    directory: Path,
    model: str,
    layers: int | None,
    dtype: str,
    context: RoleSpec,
    generation: RoleSpec,
    gpus: int = 2,
) -> Path:
    """An artifact of a built-in geometry with random weights, cut to `layers`, for `gpus` of this machine."""
    arch = read_model(model)
    if layers is not None:
        moe = replace(arch.moe, layers=tuple(i for i in arch.moe.layers if i < layers)) if arch.moe else None
        arch = replace(arch, num_layers=layers, moe=moe)
    fields: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": dtype,
        "hardware": Hardware(1, gpus, True),
        "max_seq_len": 1024,
    }
    plan = place(lower(spec(model, context, generation, **fields), arch), partial(names_for, ("sm_90a",)))
    verify(plan)
    cubins = compile_all(render_all(select(plan, ("sm_90a",))))
    plan = with_kernels(plan, tuple(cubin.kernel() for cubin in cubins))
    write(directory, plan, "", {cubin.directory.name: cubin.directory for cubin in cubins}, nvrtc=None)
    return directory


def launch(artifact: Path, lengths: list[int], max_tokens: int, directory: Path, seed: int) -> dict[str, Any]:
    """The JSON object of `helixc launch --verify` on prompts drawn from `seed`."""
    directory.mkdir(exist_ok=True)
    pick = random.Random(seed)
    prompts = [{"token_ids": [pick.randrange(1000) for _ in range(n)], "ignore_eos": True} for n in lengths]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    command = [sys.executable, "-m", "helixc", "launch", str(artifact), "--device", "cuda", "--format", "json"]
    command += ["--prompts", str(directory / "prompts.jsonl"), "--max-tokens", str(max_tokens), "--verify"]
    command += ["--run-dir", str(directory / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(done.stderr[-4000:])
    assert done.returncode == 0, f"{seed=}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(result["verify"]), json.dumps(result["metrics"]))
    assert all(len(r["token_ids"]) == max_tokens for r in result["requests"])
    return result
