"""How long the compiler takes: `python bench/compiler.py` writes bench/results/compiler.json.

Each row is the median of several runs from the shell, interpreter start included, except where it says in-process.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "compiler.json"

SMALL = "model: deepseek-v3\nload_format: dummy\nparallelism: ctx tp2 / gen tp2 cp4 ep8\n"
LARGE = "model: deepseek-v3\nload_format: dummy\nmax_seq_len: 131072\nparallelism: ctx tp8 / gen {n}x tp8 cp8 ep64\n"


def main() -> None:
    """Measure and write the results."""
    with tempfile.TemporaryDirectory() as temporary:
        rows = list(measure(Path(temporary)))
    result = {"machine": machine(), "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(folder: Path) -> list[dict[str, Any]]:
    """All rows."""
    small, large = folder / "small.yaml", folder / "large.yaml"
    small.write_text(SMALL)
    many = [folder / f"{i}.yaml" for i in range(200)]
    for path in many:
        path.write_text(SMALL)
    rows = [
        row("`helixc check`, one file", median(lambda: helixc("check", str(small)), 9)),
        row("`helixc check`, 200 files in one call", median(lambda: helixc("check", *map(str, many)), 3)),
    ]
    for instances in (32, 64):
        large.write_text(LARGE.format(n=instances))
        ranks = 8 + 64 * instances
        out = folder / "plan.json"

        def plan(out: Path = out) -> None:
            out.write_bytes(helixc("plan", str(large), "--format", "json"))

        rows.append(row(f"`helixc plan`, {ranks:,} ranks of deepseek-v3, proven and written as JSON", median(plan, 5)))
        rows.append(
            row(f"  its peak memory, {ranks:,} ranks", peak_memory("plan", str(large), "--format", "json"), "MB")
        )
    cache = folder / "cache"
    os.environ["HELIXC_CACHE_DIR"] = str(cache)
    arguments = ("compile", str(small), "-o", str(folder / "artifact"))
    empty = seconds(lambda: helixc(*arguments))
    kernels = len(json.loads((folder / "artifact" / "plan.json").read_text())["kernels"])
    rows.append(row(f"`helixc compile`, {kernels} kernels for sm_90a, empty cache", empty))
    rows.append(row("the same again, all from the cache", median(lambda: helixc(*arguments), 5)))
    return rows


def row(what: str, value: float, unit: str = "s") -> dict[str, Any]:
    return {"what": what, "value": round(value, 3), "unit": unit}


def helixc(*arguments: str) -> bytes:
    """Run the command line; its stdout."""
    return subprocess.run([sys.executable, "-m", "helixc", *arguments], check=True, capture_output=True).stdout


def peak_memory(*arguments: str) -> float:
    """Megabytes of resident memory that the command needed at most."""
    code = f"import sys; from helixc.cli import main; sys.argv[1:] = {list(arguments)!r}; main(sys.argv[1:]); "
    code += "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stderr.split()[-1]) / 1024


def median(call: Callable[[], object], times: int) -> float:
    return statistics.median(seconds(call) for _ in range(times))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> str:
    """The processor's name and how many cores we may use."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
