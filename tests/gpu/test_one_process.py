"""Exchange and reduction of two ranks in one process on one GPU: what compute-sanitizer can look at (make sanitize)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.pair import pair_plan
from helixc_runtime.manifest import Plan
from helixc_runtime.one_sided import OneSidedComm
from helixc_runtime.ops import Norm, Partial, SplitPartial
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.duo import ROWS, Duo
from tests.gpu.exchange_cases import BOUND, Part, check_results, random_part
from tests.gpu.kernel_cases import check_partial, random_case, relative_error, to_double

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

LAYERS = 3  # an odd number: the halves of the inboxes change places from step to step


@pytest.fixture(scope="module", params=["deepseek-v3-lite", "deepseek-v3", "llama-3.1-8b"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("artifact")
    return pair_plan(request.param, folder, "sm_90a", ROWS), folder


@pytest.fixture
def duo(compiled: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch) -> Duo:
    return Duo(*compiled, torch.device("cuda", torch.cuda.current_device()), monkeypatch)


def moved(part: Part, device: torch.device) -> Part:
    tensors = {name: getattr(part, name).to(device) for name in ("o", "lse", "rows", "count")}
    return replace(part, whole=Partial(*(t.to(device) for t in part.whole)), **tensors)


def test_splits(duo: Duo, seed: int) -> None:
    """Rows that either rank has whole, empty, or in 2 to 100 splits; merged before, and by the exchange: alike."""
    if not duo.shape.is_mla:
        pytest.skip("its attention leaves no splits")
    draw = random.Random(seed)
    for _ in range(2):
        rows = draw.randint(1, 4)
        layers = [
            [
                random_part(duo.shape, 1, [draw.choice([0, 0, 2, 7, 19, 34, 66, 100]) for _ in range(rows)], draw)
                for _ in range(2)
            ]
            for _ in range(LAYERS)
        ]
        on_gpu = [[moved(part, duo.device) for part in parts] for parts in layers]

        def body(rank: int, comm: OneSidedComm, ops: CudaOps, on_gpu: list[list[Part]] = on_gpu) -> list[Tensor]:
            splits = [
                SplitPartial(part.whole, part.o, part.lse, part.rows, part.count, lambda: None)
                for part in (parts[rank] for parts in on_gpu)
            ]
            return [comm.exchange(partial, ops, f"layer {i} partials") for i, partial in enumerate(splits)]

        results = duo.step(body)
        for layer, parts in enumerate(layers):
            check_results(duo.shape, parts, [of_rank[layer].cpu() for of_rank in results])
    assert duo.at_rest()


@pytest.mark.parametrize("lengths", [[[900, 0, 64, 3], [1, 0, 700, 0]], [[4000], [3]], [[17] * ROWS, [64] * ROWS]])
def test_from_attention_to_the_exchange(lengths: list[list[int]], duo: Duo, seed: int) -> None:
    """Merged before the exchange and by it, and twice: the merge may round otherwise, two runs may not."""
    cases = [random_case(duo.shape, of_rank, duo.device, seed + i, appended=True) for i, of_rank in enumerate(lengths)]
    cases[1] = replace(cases[1], q=cases[0].q)
    exact = [TorchOps(duo.shape).attend(case.q.double(), to_double(case.cache), case.batch) for case in cases]

    def body(rank: int, comm: OneSidedComm, ops: CudaOps) -> list[Tensor]:
        case = cases[rank]
        ops.begin_step(case.batch)
        before = comm.exchange(ops.attend(case.q, case.cache, case.batch), ops, "merged before")
        return [
            before,
            *(comm.exchange(ops.attend_split(case.q, case.cache, case.batch), ops, "in splits") for _ in range(2)),
        ]

    results = duo.step(body)
    assert duo.at_rest()
    heads = duo.shape.heads // 2
    for rank, (*both, again) in enumerate(results):
        mine = slice(rank * heads, (rank + 1) * heads)
        want = TorchOps(duo.shape).combine(*(torch.stack([part[i][:, mine] for part in exact]) for i in (0, 1)))
        for got in both:
            check_partial(Partial(got, want.lse), want, BOUND)
        assert torch.equal(both[1], again), "two runs differ"


def test_reductions(duo: Duo, seed: int) -> None:
    arch, rows = duo.plan.model.arch, 1 + seed % ROWS
    generator = torch.Generator(duo.device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=duo.device).bfloat16()

    x, residual = normal(2, LAYERS, rows, arch.hidden_size), normal(rows, arch.hidden_size)
    norm = Norm(normal(arch.hidden_size), arch.norm_eps)

    def body(rank: int, comm: OneSidedComm, ops: CudaOps) -> list[Tensor]:
        return [t for i in range(LAYERS) for t in comm.reduce(x[rank, i], residual, None, norm, ops, f"layer {i}")]

    first, second = duo.step(body)
    assert duo.at_rest()
    wide = Norm(norm.weight.double(), norm.eps)
    for i in range(LAYERS):
        total = x[0, i].double() + x[1, i].double()
        wanted = TorchOps(duo.shape).add_norm(total, residual.double(), None, wide)
        for got, other, want in zip(first[2 * i : 2 * i + 2], second[2 * i : 2 * i + 2], wanted, strict=True):
            assert torch.equal(got, other), "the ranks disagree"
            assert relative_error(got, want) <= 5e-3
