"""A long fuzzing campaign from the shell: `python -m tests.fuzz --files 100000 [--seed N]`."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.fuzz.campaign import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    start = time.perf_counter()
    outcome = run(arguments.files, arguments.seed)
    took = time.perf_counter() - start
    for name, raw, problem in outcome.failures:
        print(f"--- {name}\n{raw!r}\n{problem}")
    print(f"{outcome.files} files in {took:.0f} s: {outcome.plans} plans, {len(outcome.failures)} failures")
    print(", ".join(f"{code} {count}" for code, count in sorted(outcome.codes.items())))
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
