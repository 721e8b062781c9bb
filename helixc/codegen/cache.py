"""Content-addressed cubins: <cache>/<name>-<hash>/{kernel.cu, kernel.cubin, meta.json}.

The hash covers compiler version, flags, architecture, the digest of include/ and the text. An entry is written in a
temporary directory, synced and renamed, so that another process sees all of it or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helixc.codegen.nvrtc import FLAGS, Binary
from helixc.codegen.render import KernelSource

_ATTEMPTS = 8  # to put an entry in place while other processes put the same one there


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached kernel: its directory and what meta.json says of it."""

    directory: Path
    registers: int
    shared_bytes: int
    spill_bytes: int


class KernelCache:
    """A directory of cubins. Safe for any number of processes and threads."""

    def __init__(self, root: Path, compiler: str) -> None:
        self.root = root
        self._compiler = compiler

    def key(self, source: KernelSource) -> str:
        """Sixteen hex digits that change with anything that may change the cubin."""
        parts = [self._compiler, FLAGS, source.config.spec.arch, source.include_digest, source.text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def find(self, source: KernelSource) -> Entry | None:
        """The entry of `source`, or None if there is none or it is damaged."""
        return _load(self._directory(source), source)

    def store(self, source: KernelSource, binary: Binary) -> Entry:
        """Write an entry, or use the one that another process wrote meanwhile."""
        target = self._directory(source)
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            files = _files(source, binary, self._compiler)
            for name, data in files.items():
                _write_synced(temporary / name, data)
            _sync(temporary)
            temporary.chmod(0o755)  # mkdtemp's 0700 would hide the entry from other users of a shared cache
            return self._place(temporary, target, source)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, temporary: Path, target: Path, source: KernelSource) -> Entry:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(OSError):  # the target exists: ours is the same, unless that one is damaged
                temporary.rename(target)
                _sync(self.root)
            entry = _load(target, source)
            if entry is not None:
                return entry
            self._discard(target)
        raise OSError(f"cannot write the kernel cache entry {target}")

    def _discard(self, damaged: Path) -> None:
        grave = Path(tempfile.mkdtemp(prefix=".old-", dir=self.root))
        with contextlib.suppress(FileNotFoundError):
            damaged.rename(grave / "entry")
        shutil.rmtree(grave, ignore_errors=True)

    def _directory(self, source: KernelSource) -> Path:
        return self.root / f"{source.config.spec.name}-{self.key(source)}"


def cache_root() -> Path:
    """$HELIXC_CACHE_DIR, else helixc/kernels under the XDG cache directory."""
    if chosen := os.environ.get("HELIXC_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "helixc" / "kernels"


def _files(source: KernelSource, binary: Binary, compiler: str) -> dict[str, bytes]:
    text = source.text.encode()
    spec = source.config.spec
    meta = {
        "name": spec.name,
        "template": spec.template,
        "params": source.config.params,
        "arch": spec.arch,
        "compiler": f"nvrtc {compiler}",
        "flags": FLAGS,
        "include_digest": source.include_digest,
        "registers": binary.registers,
        "shared_bytes": binary.shared_bytes,
        "spill_bytes": binary.spill_bytes,
        "sha256": {"kernel.cu": _sha256(text), "kernel.cubin": _sha256(binary.cubin)},
    }
    return {
        "kernel.cu": text,
        "kernel.cubin": binary.cubin,
        "meta.json": (json.dumps(meta, indent=2) + "\n").encode(),
    }


def _load(directory: Path, source: KernelSource) -> Entry | None:
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
        intact = all(_sha256((directory / name).read_bytes()) == meta["sha256"][name] for name in _HASHED)
        if not intact or meta["sha256"]["kernel.cu"] != _sha256(source.text.encode()):
            return None
        return Entry(directory, int(meta["registers"]), int(meta["shared_bytes"]), int(meta["spill_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


_HASHED = ("kernel.cu", "kernel.cubin")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
