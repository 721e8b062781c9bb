"""The weights of one rank: the slices its plan names, read out of safetensors or made from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from helixc_runtime.dummy import dummy_tensor
from helixc_runtime.ffn_shape import GROUPED_COLUMNS
from helixc_runtime.manifest import Model, Piece, Range

FLOAT32_WEIGHTS = frozenset({"router_bias"})  # decides which experts run: never rounded

# Projections of the same input lie one after the other, so that one product serves a decode step.
FUSED = (("q", "kv_a"), ("q_a", "kv_a"), ("q", "k", "v"))
BY_COLUMNS = frozenset({"k_up"})  # kept transposed: decoding multiplies with its columns

Progress = Callable[[int, int], None]
Box = tuple[Range, ...]


class WeightError(Exception):
    """The checkpoint lacks a tensor, or has it in another shape; the message names both."""


class Weights:
    """Local tensors by (name, layer). A family over experts is stacked: [local experts, ...]."""

    def __init__(self, tensors: dict[tuple[str, int | None], Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, name: str, layer: int | None = None) -> Tensor:
        return self._tensors[name, layer]

    def get(self, name: str, layer: int | None = None) -> Tensor | None:
        """The tensor, or None where the model or this rank has none of that name."""
        return self._tensors.get((name, layer))

    def fuse(self) -> None:
        """Let the projections of FUSED lie in one memory, one after the other."""
        for names in FUSED:
            for layer in [layer for name, layer in self._tensors if name == names[0]]:
                parts = [self.get(name, layer) for name in names]
                present = [part for part in parts if part is not None]
                if len(present) == len(names):
                    views = torch.split(torch.cat(present), [len(part) for part in present])
                    self._tensors.update(zip([(name, layer) for name in names], views, strict=True))

    def fused(self, names: tuple[str, ...], layer: int) -> Tensor:
        """The rows of several matrices as one: a view after `fuse`, else a copy."""
        first, *rest = parts = [self(name, layer) for name in names]
        end = first.data_ptr()
        for part in parts:
            if part.data_ptr() != end or not part.is_contiguous() or part.is_meta:
                return torch.cat(parts)
            end += part.nbytes
        rows = len(first) + sum(map(len, rest))
        return first.as_strided((rows, first.shape[1]), first.stride())

    def to_float32(self) -> None:
        """Widen all tensors in place, one by one."""
        widened: dict[int, Tensor] = {}  # by identity: a tied LM head stays one tensor
        for key, tensor in self._tensors.items():
            self._tensors[key] = widened.setdefault(id(tensor), tensor.float())
        self.fuse()


class Source(Protocol):
    """Where pieces come from."""

    def read(self, tensor: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """The elements of `box` of the checkpoint tensor `tensor`, viewed as `shape`."""
        ...


def load_weights(model: Model, pieces: tuple[Piece, ...], device: torch.device, progress: Progress) -> Weights:
    """Read `pieces` onto `device` in the model's dtype. Raises WeightError. `progress(done, total)` counts tensors."""
    dtype = getattr(torch, model.dtype)
    total = sum(len(piece.layers) if piece.layers is not None else 1 for piece in pieces)
    tensors: dict[tuple[str, int | None], Tensor] = {}
    with ExitStack() as stack:
        source: Source = _source(model, device, stack)
        for piece in pieces:
            if (twin := _twin(piece, pieces)) in tensors:
                tensors[piece.name, None] = tensors[twin]
                continue
            kept = torch.float32 if piece.name in FLOAT32_WEIGHTS else dtype
            for layer in piece.layers if piece.layers is not None else (None,):
                tensors[piece.name, layer] = _read(source, piece, layer, kept, device)
                progress(len(tensors), total)
    weights = Weights(tensors)
    weights.fuse()
    return weights


def _twin(piece: Piece, pieces: tuple[Piece, ...]) -> tuple[str, None]:
    """The first piece that is the same slice of the same tensor: a tied LM head is the embedding, in one memory."""
    first = next(p for p in pieces if (p.tensor, p.layers, p.box) == (piece.tensor, piece.layers, piece.box))
    return first.name, None


def _source(model: Model, device: torch.device, stack: ExitStack) -> Source:
    if model.load_format == "dummy":
        return DummySource(model.seed, device)
    if model.checkpoint is None:
        raise WeightError(f"{model.name} is a built-in geometry without weights: set `load_format: dummy`")
    return Checkpoint(Path(model.checkpoint), stack)


def _read(source: Source, piece: Piece, layer: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    def one(expert: int | None) -> Tensor:
        name = piece.tensor.format(layer=layer, expert=expert)
        return source.read(name, piece.shape, piece.box).to(device=device, dtype=dtype)

    if piece.name in BY_COLUMNS:
        return one(None).transpose(1, 2).contiguous().transpose(1, 2)
    if piece.experts is None:
        return one(None).contiguous()
    return _aligned(torch.stack([one(expert) for expert in range(*piece.experts)]), piece.name)


def _aligned(experts: Tensor, name: str) -> Tensor:
    """[experts, ...] with the intermediate columns padded by zeros to what grouped products take; they add nothing."""
    dim = 2 if name == "expert_down" else 1
    missing = -experts.shape[dim] % GROUPED_COLUMNS
    return F.pad(experts, (0, missing) if dim == 2 else (0, 0, 0, missing)) if missing else experts


class Checkpoint:
    """A folder of safetensors, with or without an index. Only the bytes of the slices asked for are read."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._files: dict[str, Any] = {}
        self._file_of = dict(_index(folder))

    def read(self, tensor: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """See Source.read. A view with more dims than the stored tensor splits its rows."""
        view = self._open(tensor).get_slice(tensor)
        stored = tuple(view.get_shape())
        if shape == stored:
            return _tensor(view[tuple(slice(lo, hi) for lo, hi in box)])
        rows = shape[1] if len(shape) == len(stored) + 1 else 1
        if (shape[0] * rows, *shape[2:]) != stored:
            raise WeightError(f"{tensor} in {self.folder} has shape {list(stored)}, config.json implies {list(shape)}")
        (lo, hi), rest = box[0], box[1:]
        whole = _tensor(view[lo * rows : hi * rows]).view(hi - lo, *shape[1:])
        return whole[(slice(None), *(slice(a, b) for a, b in rest))]

    def _open(self, tensor: str) -> Any:
        name = self._file_of.get(tensor)
        if name is None:
            raise WeightError(f"{self.folder} has no tensor {tensor}; it holds {len(self._file_of)} others")
        if name not in self._files:
            self._files[name] = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
        return self._files[name]


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _index(folder: Path) -> Iterator[tuple[str, str]]:
    """(tensor, file) of every tensor in the checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        yield from json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        return
    single = folder / "model.safetensors"
    if not single.is_file():
        raise WeightError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as file:
        yield from ((name, single.name) for name in file.keys())  # noqa: SIM118 (safe_open is no mapping)


class DummySource:
    """Random weights that depend only on the seed, the tensor's name and the element: any slice equals the whole's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def read(self, tensor: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """See Source.read."""
        return dummy_tensor(self.seed, tensor, shape, box, self.device)
