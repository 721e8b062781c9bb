"""Random deployments that are legal, of models that exist nowhere: odd heads, odd blocks, uneven stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc_runtime.manifest import Instance, Mla, ModelArch, Moe, Plan, Rank, Rope
from tests.deployments import role, spec

LARGEST = 64


@dataclass(frozen=True)
class Sizes:
    """Of one instance; `partition`: layers of each stage, None for an even split."""

    tp: int
    cp: int
    pp: int
    ep: int
    dp: bool = False
    instances: int = 1
    partition: tuple[int, ...] | None = None
    space: str = "latent"  # of the exchange, for latent attention


class Case:
    """A plan, what it was made from, and the roles by name."""

    def __init__(self, arch: ModelArch, block: int, context: Sizes | None, generation: Sizes) -> None:
        self.arch, self.block, self.context, self.generation = arch, block, context, generation
        made = spec("qwen3-8b", _role(context, block) if context else None, _role(generation, block))
        self.plan: Plan = place(lower(made, arch), lambda *_: ())

    def __repr__(self) -> str:
        return f"Case({self.arch!r}, {self.block}, {self.context!r}, {self.generation!r})"

    def sizes(self, role: str) -> Sizes:
        found = self.context if role == "context" else self.generation
        assert found is not None
        return found

    def instances(self, role: str) -> list[Instance]:
        return [i for i in self.plan.instances if i.role == role]

    def ranks(self, instance: Instance) -> list[Rank]:
        return [self.plan.ranks[rank] for rank in instance.ranks]


def divisors(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, min(n, LARGEST) + 1) if n % d == 0])


@st.composite
def grids(draw: st.DrawFn, most: int, cp: int = LARGEST) -> Sizes:
    """tp, cp, pp and ep up to 64 each (cp up to `cp`), at most `most` ranks; any of the sizes may be the large one."""
    drawn, room = {"tp": 1, "cp": 1, "pp": 1}, most
    for name in draw(st.permutations(list(drawn))):
        limit = min(room, cp if name == "cp" else LARGEST)
        drawn[name] = draw(st.integers(1, limit) | st.just(limit))
        room //= drawn[name]
    return Sizes(**drawn, ep=draw(divisors(drawn["tp"] * drawn["cp"])))


@st.composite
def partitions(draw: st.DrawFn, layers: int, pp: int) -> tuple[int, ...] | None:
    """Layers of each stage: None, or any split with a layer in every stage."""
    if draw(st.booleans()):
        return None
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), min_size=pp - 1, max_size=pp - 1))) if pp > 1 else []
    return tuple(hi - lo for lo, hi in zip([0, *cuts], [*cuts, layers], strict=True))


@st.composite
def cases(draw: st.DrawFn, most: int = 96, context_most: int | None = None) -> Case:
    """A deployment of at most `most` ranks an instance. Sizes divide where helixc demands it, and only there.

    `context_most`: there are context instances, of at most so many ranks; None: there may be.
    """
    generation = draw(grids(most))
    contexts = grids(context_most or most // 4, cp=1)
    context = draw(contexts if context_most else st.none() | contexts)
    fewest = max(generation.pp, context.pp if context else 1)
    layers = draw(st.integers(fewest, fewest + 6))
    dp = draw(st.booleans())
    context_dp = draw(st.booleans())
    # Heads divide over tp * cp of generation and over tp of context, unless data parallelism leaves them whole.
    ways = [generation.cp if dp else generation.tp * generation.cp]
    ways += [context.tp if context and not context_dp else 1]
    heads = _common(ways) * draw(st.sampled_from((1, 3, 5)))
    mla = draw(st.booleans())
    kv_heads = 1 if mla else _kv_heads(draw, heads, [1 if dp else generation.tp, ways[1]])
    arch = _arch(draw, layers, heads, kv_heads, mla, [s for s in (context, generation) if s])
    generation = _with(draw, generation, arch, dp=dp)
    context = _with(draw, context, arch, dp=context_dp) if context else None
    return Case(arch, draw(st.integers(1, 65)), context, generation)


_spaces = st.sampled_from(("latent", "value"))


def _with(draw: st.DrawFn, sizes: Sizes, arch: ModelArch, *, dp: bool) -> Sizes:
    """The sizes with everything that depends on the model; without experts there is no expert parallelism."""
    partition = draw(partitions(arch.num_layers, sizes.pp))
    ep = sizes.ep if arch.moe else 1
    return Sizes(sizes.tp, sizes.cp, sizes.pp, ep, dp, draw(st.integers(1, 3)), partition, draw(_spaces))


def _role(sizes: Sizes, block: int) -> Any:
    shape = {"tp": sizes.tp, "cp": sizes.cp, "pp": sizes.pp, "ep": sizes.ep, "dp": sizes.dp, "n": sizes.instances}
    return role(**shape, pp_partition=sizes.partition, block=block, exchange_space=sizes.space)


def _common(sizes: list[int]) -> int:
    """Their least common multiple, by trying."""
    return next(n for n in range(max(sizes), 4096 * 4096, max(sizes)) if all(n % size == 0 for size in sizes))


def _kv_heads(draw: st.DrawFn, heads: int, ways: list[int]) -> int:
    """KV heads that divide over each tp, or that each tp is a multiple of (then neighbours share one)."""
    fit = [k for k in range(1, heads + 1) if heads % k == 0 and all(k % w == 0 or w % k == 0 for w in ways)]
    return draw(st.sampled_from(fit))


def _arch(draw: st.DrawFn, layers: int, heads: int, kv_heads: int, mla: bool, sizes: list[Sizes]) -> ModelArch:
    width = draw(st.sampled_from((1, 3, 4)))  # of a head
    ffn = _common([s.tp * s.cp for s in sizes])
    latent = Mla(draw(st.sampled_from((None, 5))), 6, 3, 2, 4) if mla else None
    moe = None
    if draw(st.booleans()):
        experts = _common([s.ep for s in sizes]) * draw(st.integers(1, 3))
        inner = _common([s.tp * s.cp // s.ep for s in sizes]) * draw(st.integers(1, 3))
        shared = draw(st.sampled_from((0, ffn)))
        at = tuple(i for i in range(layers) if i >= draw(st.integers(0, layers - 1)) or i == layers - 1)
        moe = Moe(at, experts, 1, inner, shared, "softmax", draw(st.booleans()), 1, 1, "max", True, 1.0)
    return ModelArch(
        architecture="none",
        hidden_size=7,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8 if mla else width,
        intermediate_size=ffn * draw(st.integers(1, 3)),
        vocab_size=ffn * draw(st.integers(1, 3)),
        max_position=4096,
        norm_eps=1e-6,
        rope=Rope(1e4, False),
        mla=latent,
        moe=moe,
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        eos_token_ids=(0,),
    )
