"""A whole `helixc launch` in which something befalls a rank while it decodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

GRACE_S = 30.0  # from the fault's deadline until the launcher has ended


class Decoding:
    """A launch of one request of one token, in a context manager; nothing of it is left running afterwards."""

    def __init__(self, artifact: Path, device: str, directory: Path, max_tokens: int, deadline_s: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        prompts = directory / "prompts.jsonl"
        prompts.write_text(json.dumps({"token_ids": [7], "ignore_eos": True}) + "\n")
        command = [sys.executable, "-m", "helixc", "launch", str(artifact), "--device", device, "--format", "json"]
        command += ["--prompts", str(prompts), "--max-tokens", str(max_tokens), "--deadline", str(deadline_s)]
        command += ["--run-dir", str(directory / "run")]
        self.deadline_s = deadline_s
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._said: list[str] = []
        self.pids: dict[int, int] = {}
        self._decodes = threading.Event()
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_stderr, self._read_stdout)]
        self._stdout = ""
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Decoding:
        assert self._decodes.wait(120) and self.pids, "".join(self._said)
        time.sleep(0.1)  # in the midst of steps
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in [*self.pids.values(), self._process.pid]:
            if running(pid):
                os.kill(pid, signal.SIGKILL)

    def end(self, seconds: float) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the launcher, which ends within `seconds`; no rank may survive it."""
        self._process.wait(timeout=seconds)
        for reader in self._readers:
            reader.join()
        deadline = time.monotonic() + 5
        while (left := [rank for rank, pid in self.pids.items() if running(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"ranks {left} are still running"
        return self._process.returncode, self._stdout, "".join(self._said)

    def _read_stderr(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._said.append(line)
            if line.rstrip().endswith("] decoding"):
                self.pids = ranks_under(self._process.pid)
                self._decodes.set()
        self._decodes.set()  # nothing more will come

    def _read_stdout(self) -> None:
        assert self._process.stdout
        self._stdout = self._process.stdout.read()


def ranks_under(pid: int) -> dict[int, int]:
    """The process of each rank, of those that process `pid` has started."""
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        environment = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in entry
        )
        if "RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def running(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def check_a_fault(decoding: Decoding, number: signal.Signals, rank: int) -> None:
    """`rank` is killed or stopped: the launch ends by the deadline, and its error names the rank and what befell it."""
    os.kill(decoding.pids[rank], number)
    code, _, said = decoding.end(decoding.deadline_s + GRACE_S)
    error = said[said.rindex("error: ") :].splitlines()[0]
    assert code != 0
    assert error.startswith(f"error: rank {rank} "), said
    assert ("SIGKILL" if number == signal.SIGKILL else "heartbeat") in error, said


def check_a_delay(decoding: Decoding, rank: int, seconds: float, max_tokens: int) -> None:
    """`rank` pauses for less than the deadline: nothing is lost."""
    os.kill(decoding.pids[rank], signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(decoding.pids[rank], signal.SIGCONT)
    code, result, said = decoding.end(240)
    assert code == 0, said
    assert len(json.loads(result)["requests"][0]["token_ids"]) == max_tokens
