"""Random partials in splits, as Hopper's MLA leaves them, and what an exchange must make of those of all ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import Partial
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.kernel_cases import check_partial, mla

BOUND = 6e-3  # relative Frobenius error of o: each rank's part is rounded to bfloat16, and so is their merge


@dataclass(frozen=True)
class Part:
    """What attention leaves on one rank."""

    whole: Partial  # [N, H, P], NaN in the rows that are split
    o: Tensor  # [splits, Q, P]
    lse: Tensor  # [splits, Q]
    rows: Tensor  # [rows, 4]
    count: Tensor  # [1]

    @property
    def merged(self) -> Partial:
        """In float64, [N, H, P]."""
        o, lse = (t.double() for t in self.whole)
        tokens = self.o.shape[1] // o.shape[1]
        for row, first, count, _ in self.rows[: int(self.count)].tolist():
            parts = (t[first : first + count].double().unflatten(1, (tokens, o.shape[1])) for t in (self.o, self.lse))
            own = slice(row * tokens, (row + 1) * tokens)
            o[own], lse[own] = TorchOps(mla(8, 32)).combine(*parts)
        return Partial(o, lse)


def random_part(shape: AttentionShape, tokens: int, counts: list[int], draw: random.Random) -> Part:
    """Whole rows, empty ones with NaN in memory, and split ones, of which one query token may see nothing."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))

    def normal(*size: int) -> Tensor:
        x = torch.randn(*size, generator=generator)
        x[torch.rand(size, generator=generator) < 0.1] = -0.0
        return x

    rows, heads, width = len(counts), shape.heads, shape.partial_dim
    o, lse = normal(rows * tokens, heads, width).bfloat16(), 4 * normal(rows * tokens, heads)
    split = torch.zeros(rows, 4, dtype=torch.int32)
    given, least = 0, []
    for row, count in enumerate(counts):
        own = slice(row * tokens, (row + 1) * tokens)
        if count:
            least.append(sum(counts[:row]))
            o[own], lse[own] = torch.nan, torch.nan
            split[given] = torch.tensor([row, sum(counts[:row]), count, -1])
            given += 1
        elif draw.random() < 0.4:
            o[own], lse[own] = torch.nan, -torch.inf
    split[given:] = -7  # what is there is not of this step
    part_o = normal(sum(counts) + 1, tokens * heads, width).bfloat16()
    part_lse = 4 * normal(sum(counts) + 1, tokens * heads)
    # 0 and, of each row's first split, the least negative number there is: part of that rounds to -0.
    part_o[..., 2:4] = 0.0
    part_o[least, :, 3] = -torch.finfo(torch.bfloat16).smallest_normal / 128
    if tokens > 1:  # the first token sees nothing, of some splits or of all
        part_lse[torch.rand(len(part_lse), generator=generator) < draw.choice([0.3, 1.0]), :heads] = -torch.inf
    return Part(Partial(o, lse), part_o, part_lse, split, torch.tensor([given], dtype=torch.int32))


def check_results(shape: AttentionShape, parts: list[Part], results: list[Tensor]) -> None:
    """Of all ranks, against float64."""
    heads, wanted = shape.heads // len(parts), [part.merged for part in parts]
    for rank, got in enumerate(results):
        mine = slice(rank * heads, (rank + 1) * heads)
        o, lse = (torch.stack([part[i][:, mine] for part in wanted]) for i in (0, 1))
        want = TorchOps(shape).combine(o, lse)
        check_partial(Partial(got, want.lse), want, BOUND)  # the kernel gives no LSE: what is checked is o
