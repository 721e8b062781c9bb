"""Other implementations of decode attention, those that can be imported: FlashInfer, FlashMLA, torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import LayerCache

Attention = Callable[[int], Tensor]  # over the i-th page table -> o [N, H, P]


@dataclass(frozen=True)
class Problem:
    """One row of the table: several page tables over one pool of pages, N = rows * query_tokens queries."""

    shape: AttentionShape
    lengths: list[int]  # of the rows' last query tokens
    q: Tensor  # [N, H, D]
    cache: LayerCache
    tables: list[Tensor]

    @property
    def kv_bytes(self) -> int:
        """Of one page table, FP8 scales included."""
        shape = self.shape
        token = shape.head_dim * self.cache.k.element_size() + shape.scale_bytes
        return sum(self.lengths) * shape.kv_heads * token * (1 if shape.is_mla else 2)

    @property
    def flop(self) -> int:
        """Of both products."""
        shape, behind = self.shape, sum(range(self.shape.query_tokens))  # tokens that earlier queries do not see
        pairs = shape.query_tokens * sum(self.lengths) - behind * len(self.lengths)
        return 2 * shape.heads * pairs * (shape.head_dim + shape.partial_dim)


@dataclass(frozen=True)
class Peer:
    """Another implementation. `prepare` plans one problem, outside of what is timed."""

    name: str
    version: str
    serves: Callable[[Problem], bool]
    prepare: Callable[[Problem], Attention]


def peers() -> list[Peer]:
    """Those that can be imported here."""
    found = [Peer("torch sdpa", torch.__version__, _sdpa_serves, sdpa)]
    try:
        import flashinfer
    except ImportError as error:
        print(f"FlashInfer is not here: {error}")
    else:
        release = str(flashinfer.__version__)
        found.append(Peer("flashinfer", release, lambda p: _bfloat16(p) and not p.shape.is_mla, flashinfer_gqa))
        for backend in ("fa2", "fa3"):
            prepare = flashinfer_mla(backend)
            found.append(Peer(f"flashinfer {backend}", release, lambda p: _bfloat16(p) and p.shape.is_mla, prepare))
    try:
        _, release = flash_mla()
    except ImportError as error:
        print(f"FlashMLA is not here: {error}")
    else:
        found.append(Peer("flashmla", release, lambda p: _bfloat16(p) and p.shape.is_mla, flashmla))
    return found


def flash_mla() -> tuple[Any, str]:
    """FlashMLA's module and version: from its own repository, or as SGLang ships it (package sglang-kernel)."""
    try:
        module = import_module("flash_mla")
    except ImportError:
        module = import_module("sgl_kernel.flash_mla")
        if (error := getattr(module, "_flashmla_import_error", None)) is not None:
            raise ImportError(f"sglang-kernel: {error}") from error
        return module, f"of sglang-kernel {version('sglang-kernel')}"
    return module, str(getattr(module, "__version__", "?"))


def _bfloat16(problem: Problem) -> bool:
    return problem.shape.kv_dtype == "bfloat16"


def _sdpa_serves(problem: Problem) -> bool:
    """One query a row, for its causal mask ends at the first token; rows of one length, for it knows no others."""
    one = problem.shape.query_tokens == 1 and len(set(problem.lengths)) == 1
    return _bfloat16(problem) and not problem.shape.is_mla and one


def sdpa(problem: Problem) -> Attention:
    """torch's flash attention, which returns the LSE as well, on contiguous K and V: it has no pages to look up."""
    length, q = problem.lengths[0], problem.q.unsqueeze(2)  # [B, H, 1, D]
    pages = -(-length // problem.shape.block)
    assert problem.cache.v is not None
    contiguous = [
        [pool[table[:, :pages].long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous() for table in tables]
        for pool, tables in ((problem.cache.k, problem.tables), (problem.cache.v, problem.tables))
    ]  # [B, KH, L, D] each

    def launch(i: int) -> Tensor:
        o, _ = flash(q, contiguous[0][i], contiguous[1][i], problem.shape.scale)
        return o.squeeze(2)

    return launch


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, 1, D], k and v [B, KH, L, D] -> o [B, H, 1, D], lse [B, H, 1] float32."""
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return o, lse


def flashinfer_gqa(problem: Problem) -> Attention:
    """Its batch decode on tensor cores, the faster one for groups of heads."""
    import flashinfer

    work, shape, device = workspace(problem), problem.shape, problem.q.device
    assert problem.cache.v is not None
    cache = (problem.cache.k, problem.cache.v)
    tokens = {} if shape.query_tokens == 1 else {"q_len_per_req": shape.query_tokens}  # causal among themselves
    wrappers = []
    for indptr, indices, last in paged(problem):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "HND", use_tensor_cores=True)
        sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.block)
        wrapper.plan(indptr, indices, last, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, **tokens)
        wrappers.append(wrapper)
    o, lse = torch.empty_like(problem.q), torch.empty(problem.q.shape[:2], device=device)

    def launch(i: int) -> Tensor:
        wrappers[i].run(problem.q, cache, out=o, lse=lse, return_lse=True)
        return o

    return launch


def flashinfer_mla(backend: str) -> Callable[[Problem], Attention]:
    """Its paged MLA attention by one backend."""

    def prepare(problem: Problem) -> Attention:
        import flashinfer

        work, shape, device = workspace(problem), problem.shape, problem.q.device
        tokens = shape.query_tokens
        q_indptr = torch.arange(len(problem.lengths) + 1, dtype=torch.int32, device=device) * tokens
        lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
        wrappers = []
        for indptr, indices, _ in paged(problem):
            wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(work, backend=backend)
            where = (q_indptr, indptr.to(device), indices, lengths)
            causal, dtypes = tokens > 1, (torch.bfloat16, torch.bfloat16)
            wrapper.plan(*where, shape.heads, 512, 64, shape.block, causal, shape.scale, *dtypes)
            wrappers.append(wrapper)
        q, q_rope = problem.q[..., :512].contiguous(), problem.q[..., 512:].contiguous()
        latent, rope = problem.cache.k[..., :512], problem.cache.k[..., 512:]
        o, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)

        def launch(i: int) -> Tensor:
            wrappers[i].run(q, q_rope, latent, rope, out=o, lse=lse, return_lse=True)
            return o

        return launch

    return prepare


def flashmla(problem: Problem) -> Attention:
    """FlashMLA's dense decode; its schedule kernel is left out, like ours."""
    (module, _), shape = flash_mla(), problem.shape
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=problem.q.device)
    plan = module.get_mla_metadata(lengths, shape.heads * shape.query_tokens, 1)
    q = problem.q.view(-1, shape.query_tokens, *problem.q.shape[1:])  # [B, T, H, D]
    cache = problem.cache.k.unsqueeze(2)

    def launch(i: int) -> Tensor:
        options = {"softmax_scale": shape.scale, "causal": shape.query_tokens > 1}
        o: Tensor = module.flash_mla_with_kvcache(q, cache, problem.tables[i], lengths, 512, *plan, **options)[0]
        return o.flatten(0, 1)

    return launch


def paged(problem: Problem) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every page table as FlashInfer's (indptr, page indices, tokens of each row's last page)."""
    block = problem.shape.block
    pages = [-(-length // block) for length in problem.lengths]
    indptr = torch.tensor([sum(pages[:row]) for row in range(len(pages) + 1)], dtype=torch.int32)
    last = torch.tensor([(n - 1) % block + 1 for n in problem.lengths], dtype=torch.int32)
    for table in problem.tables:
        yield indptr, torch.cat([table[row, :n] for row, n in enumerate(pages)]), last


def workspace(problem: Problem) -> Tensor:
    """FlashInfer's scratch memory. Its wrappers of one problem run one after another and may share it."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=problem.q.device)
