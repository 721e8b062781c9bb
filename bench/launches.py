"""Whole launches on two GPUs, verified: `python bench/launches.py` writes bench/results/launches.json.

Context and generation instances share the GPUs. TTL here is that of the plain kernels and of NCCL, run eagerly; making
them fast is other work. What this bench shows is exactness on real dimensions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402

from tests.deployments import role  # noqa: E402
from tests.gpu.launches import compiled, launch  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "launches.json"
LENGTHS, TOKENS = [1, 7, 100, 400], 64
SEED = 1
CASES: list[tuple[str, int | None, str, dict[str, Any], dict[str, Any]]] = [
    ("deepseek-v3-lite", None, "bfloat16", {"tp": 2}, {"cp": 2, "block": 32}),
    ("deepseek-v3-lite", 3, "float32", {"tp": 2}, {"cp": 2, "block": 32}),
    ("llama-3.1-8b", None, "bfloat16", {"tp": 2}, {"cp": 2, "block": 32}),
    ("llama-3.1-8b", 3, "float32", {"tp": 2}, {"cp": 2, "block": 32}),
    ("qwen3-235b-a22b", 3, "float32", {}, {"cp": 2, "block": 32}),
]


def main() -> None:
    """Launch every case and write the results."""
    rows = []
    for model, layers, dtype, context, generation in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            artifact = compiled(folder / "artifact", model, layers, dtype, role(**context), role(**generation))
            plan = json.loads((artifact / "plan.json").read_text())
            found = launch(artifact, LENGTHS, TOKENS, folder, SEED)
            rows.append(
                {
                    "model": model,
                    "layers": plan["model"]["arch"]["num_layers"],
                    "dtype": dtype,
                    "layout": plan["name"],
                    "max_abs_logit_diff": found["verify"]["max_abs_logit_diff"],
                    "first_difference": found["verify"]["first_difference"],
                    "ttl_p50_ms": 1000 * found["metrics"]["ttl_p50_s"],
                    "handoff_bytes": found["metrics"]["handoff_bytes"],
                }
            )
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    result = {"machine": gpu, "prompts": LENGTHS, "tokens": TOKENS, "rows": rows}
    text = json.dumps(result, indent=1) + "\n"
    (Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
