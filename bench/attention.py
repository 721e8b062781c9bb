"""Decode attention against FlashInfer and FlashMLA on one GPU: `python bench/attention.py [RESULT.json]`.

Every row is one launch of attention for one layer: ours (partial and merge, as Ops.attend launches them), each peer
that can be imported, and a plain read of the same pages. All are captured in CUDA graphs over several page tables, so
that no replay finds its KV in L2, and replayed in turn; medians. Schedules (ours, and the peers' plan) are made before:
they serve all layers of a step. Every result is compared with the peers'.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from helixc.codegen.build import compile_all, render_all  # noqa: E402
from helixc.codegen.nvrtc import Nvrtc  # noqa: E402
from helixc.codegen.problem import problems  # noqa: E402
from helixc_runtime.attention_shape import AttentionShape  # noqa: E402
from helixc_runtime.cubin import LoadedKernel, device_arch  # noqa: E402
from helixc_runtime.ops import DecodeBatch, LayerCache  # noqa: E402
from helixc_runtime.ops_cuda import CudaOps  # noqa: E402
from tests.gpu.kernel_cases import gqa, mla  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "attention.json"
K, BLOCK, REPLAYS, L2_BYTES = 1024, 64, 9, 50 << 20
RAGGED = [int(K * 2 ** (i * 8 / 15)) for i in range(16)]  # 1k to 256k
MLA_LENGTHS = {
    "1x16k": [16 * K],
    "1x64k": [64 * K],
    "1x512k": [512 * K],
    "4x128k": [128 * K] * 4,
    "8x32k": [32 * K] * 8,
    "32x8k": [8 * K] * 32,
    "128x4k": [4 * K] * 128,
    "ragged 16x1k-256k": RAGGED,
}
GQA_LENGTHS = {
    "1x64k": [64 * K],
    "1x512k": [512 * K],
    "8x32k": [32 * K] * 8,
    "32x8k": [8 * K] * 32,
    "128x2k": [2 * K] * 128,
}
SHAPES = [("mla", mla(heads, BLOCK)) for heads in (128, 64, 32, 16)] + [
    ("gqa", gqa(heads, kv_heads, 128, BLOCK)) for heads, kv_heads in ((64, 8), (32, 8), (64, 4), (16, 1), (8, 1))
]
READ = """
extern "C" __global__ void __launch_bounds__(512)
read_pages(const uint4* pages, const int* table, int count, int vectors, unsigned* sink) {
  unsigned all = 0;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const uint4* page = pages + (long long)table[i] * vectors;
#pragma unroll 8
    for (int v = threadIdx.x; v < vectors; v += 512) {
      uint4 x;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(page + v));
      all ^= x.x ^ x.y ^ x.z ^ x.w;
    }
  }
  if (all == 0x12345678) *sink = all;
}
"""

Launch = Callable[[int], Tensor]  # attention over the i-th page table -> o [B, H, P]


@dataclass(frozen=True)
class Problem:
    """One row of the table: several page tables over one pool of pages."""

    shape: AttentionShape
    lengths: list[int]
    q: Tensor
    cache: LayerCache
    tables: list[Tensor]

    @property
    def kv_bytes(self) -> int:
        width = self.shape.head_dim if self.shape.is_mla else 2 * self.shape.head_dim
        return sum(self.lengths) * self.shape.kv_heads * width * 2


def main() -> None:
    """Measure every row and write the results."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    found = peers()
    with tempfile.TemporaryDirectory() as folder:
        reader = pure_read(Path(folder), device)
        rows = [row for op, shape in SHAPES for row in measure(op, shape, Path(folder), device, found, reader)]
    result = {
        "gpu": torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "nvrtc": Nvrtc().version} | {p.name: p.version for p in found},
        "rows": rows,
    }
    (Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS).write_text(json.dumps(result, indent=1) + "\n")


def measure(
    op: str, shape: AttentionShape, folder: Path, device: torch.device, found: list[Peer], reader: LoadedKernel
) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    sources = render_all(problems(shape, 2, device_arch(device)))
    kernels = [cubin.kernel() for cubin in compile_all(sources, cache=folder / "kernels")]
    cache = pool(shape, device)
    for case, lengths in (MLA_LENGTHS if op == "mla" else GQA_LENGTHS).items():
        problem = make_problem(shape, lengths, cache, device)
        runs = {"ours": ours(problem, lambda: CudaOps(shape, kernels, folder, device))}
        for peer in (peer for peer in found if peer.serves(shape)):
            try:
                runs[peer.name] = peer.prepare(problem)
                runs[peer.name](0)
            except Exception as error:  # a peer that cannot run here must not stop the others
                print(f"{peer.name} cannot run {case}: {type(error).__name__}: {error}")
                runs.pop(peer.name, None)
        agree(runs)
        runs["read"] = read(problem, reader)
        times = medians(runs, len(problem.tables), problem.kv_bytes)
        yield report(op, shape, case, problem, times)
    torch.cuda.empty_cache()


def report(op: str, shape: AttentionShape, case: str, problem: Problem, times: dict[str, float]) -> dict[str, Any]:
    """One row of the results, also printed."""
    ours_us, floor_us = times.pop("ours"), times.pop("read")
    peer = min(times, key=lambda name: times[name]) if times else None
    heads = f"H {shape.heads}" if shape.is_mla else f"({shape.heads},{shape.kv_heads})"
    row = {
        "op": op,
        "dtype": "bfloat16",
        "case": f"{case}, {heads}",
        "ours_us": round(ours_us, 2),
        "peer": peer,
        "peer_us": round(times[peer], 2) if peer else None,
        "ratio": round(times[peer] / ours_us, 3) if peer else None,
        "floor_us": round(floor_us, 2),
        "tflops": round(2 * shape.heads * sum(problem.lengths) * (shape.head_dim + shape.partial_dim) / ours_us / 1e6),
    }
    print(json.dumps(row), flush=True)
    return row


# --- Problems ---------------------------------------------------------------------------------------------------


def pool(shape: AttentionShape, device: torch.device) -> LayerCache:
    """Pages of about 2.4 GB, filled with random numbers."""
    size = (BLOCK, shape.head_dim) if shape.is_mla else (shape.kv_heads, BLOCK, shape.head_dim)
    matrices = 1 if shape.is_mla else 2
    pages = max(2_400_000_000 // (matrices * 2 * math.prod(size)), 9 * K)
    made = [torch.empty(pages, *size, dtype=torch.bfloat16, device=device) for _ in range(matrices)]
    for tensor in made:
        for part in tensor.split(4096):
            part.normal_()
    return LayerCache(made[0], made[1] if matrices == 2 else None)


def make_problem(shape: AttentionShape, lengths: list[int], cache: LayerCache, device: torch.device) -> Problem:
    """Enough page tables that their KV is several times the L2, pages in random order."""
    pages = [-(-length // BLOCK) for length in lengths]
    q = torch.randn(len(lengths), shape.heads, shape.head_dim, device=device).bfloat16()
    problem = Problem(shape, lengths, q, cache, [])
    sets = max(2, min(8, 4 * L2_BYTES // problem.kv_bytes + 1))
    for _ in range(sets):
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=device)
        order = torch.randperm(cache.k.shape[0], device=device)[: sum(pages)].int()
        for row, part in enumerate(order.split(pages)):
            table[row, : len(part)] = part
        problem.tables.append(table)
    return problem


def ours(problem: Problem, make: Callable[[], CudaOps]) -> Launch:
    """Ops.attend, with one Ops a page table: each holds the schedule of its step."""
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=problem.q.device)
    unused = torch.zeros(0, device=problem.q.device)
    batches = [DecodeBatch(unused, unused, table, lengths, unused, unused) for table in problem.tables]
    ops = [make() for _ in batches]
    for op, batch in zip(ops, batches, strict=True):
        op.begin_step(batch)
    torch.cuda.synchronize()
    return lambda i: ops[i].attend(problem.q, problem.cache, batches[i]).o


def pure_read(folder: Path, device: torch.device) -> LoadedKernel:
    """A kernel that reads pages and does nothing with them: what the memory can do."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(READ.encode(), b"read.cu", 0, [], [])
    flags = [f"-arch={device_arch(device)}".encode()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    cubin = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, cubin)
    path = folder / "read.cubin"
    path.write_bytes(cubin)
    return LoadedKernel(path, "read_pages", ("pointer", "pointer", "int32", "int32", "pointer"), 512, device)


def read(problem: Problem, reader: LoadedKernel) -> Launch:
    """Read each page of K (and V) of the problem once."""
    sink = torch.zeros(1, dtype=torch.int32, device=problem.q.device)
    pages = [-(-length // BLOCK) for length in problem.lengths]
    tables = [torch.cat([t[row, :n] for row, n in enumerate(pages)]).contiguous() for t in problem.tables]
    tensors = [t for t in (problem.cache.k, problem.cache.v) if t is not None]

    def launch(i: int) -> Tensor:
        for tensor in tensors:
            vectors = tensor[0].numel() * 2 // 16
            grid = (min(len(tables[i]), 4 * 132), 1, 1)
            table = tables[i].data_ptr()
            reader.launch(grid, tensor.data_ptr(), table, len(tables[i]), vectors, sink.data_ptr())
        return sink

    return launch


# --- Peers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another implementation. `prepare` plans one problem, outside of what is timed."""

    name: str
    version: str
    serves: Callable[[AttentionShape], bool]
    prepare: Callable[[Problem], Launch]


def peers() -> list[Peer]:
    """Those that can be imported here."""
    found: list[Peer] = []
    try:
        import flashinfer
    except ImportError as error:
        print(f"FlashInfer is not here: {error}")
    else:
        version = str(flashinfer.__version__)
        found.append(Peer("flashinfer", version, lambda s: not s.is_mla, flashinfer_gqa))
        for backend in ("fa2", "fa3"):
            prepare = flashinfer_mla(backend)
            found.append(Peer(f"flashinfer {backend}", version, lambda s: s.is_mla, prepare))
    try:
        import flash_mla
    except ImportError as error:
        print(f"FlashMLA is not here: {error}")
    else:
        version = str(getattr(flash_mla, "__version__", "?"))
        found.append(Peer("flashmla", version, lambda s: s.is_mla, flashmla))
    return found


def flashinfer_gqa(problem: Problem) -> Launch:
    """Its batch decode on tensor cores, the faster one for groups of heads."""
    import flashinfer

    work, shape, device = workspace(problem), problem.shape, problem.q.device
    assert problem.cache.v is not None
    cache = (problem.cache.k, problem.cache.v)
    wrappers = []
    for indptr, indices, last in paged(problem):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "HND", use_tensor_cores=True)
        sizes = (shape.heads, shape.kv_heads, shape.head_dim, BLOCK)
        wrapper.plan(indptr, indices, last, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        wrappers.append(wrapper)
    o, lse = torch.empty_like(problem.q), torch.empty(problem.q.shape[:2], device=device)

    def launch(i: int) -> Tensor:
        wrappers[i].run(problem.q, cache, out=o, lse=lse, return_lse=True)
        return o

    return launch


def flashinfer_mla(backend: str) -> Callable[[Problem], Launch]:
    """Its paged MLA attention by one backend."""

    def prepare(problem: Problem) -> Launch:
        import flashinfer

        work, shape, device = workspace(problem), problem.shape, problem.q.device
        q_indptr = torch.arange(len(problem.lengths) + 1, dtype=torch.int32, device=device)
        lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
        wrappers = []
        for indptr, indices, _ in paged(problem):
            wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(work, backend=backend)
            where = (q_indptr, indptr.to(device), indices, lengths)
            dtypes = (torch.bfloat16, torch.bfloat16)
            wrapper.plan(*where, shape.heads, 512, 64, BLOCK, False, shape.scale, *dtypes)
            wrappers.append(wrapper)
        q, q_rope = problem.q[..., :512].contiguous(), problem.q[..., 512:].contiguous()
        latent, rope = problem.cache.k[..., :512], problem.cache.k[..., 512:]
        o, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)

        def launch(i: int) -> Tensor:
            wrappers[i].run(q, q_rope, latent, rope, out=o, lse=lse, return_lse=True)
            return o

        return launch

    return prepare


def flashmla(problem: Problem) -> Launch:
    """FlashMLA's dense decode; its schedule kernel is left out, like ours."""
    import flash_mla

    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=problem.q.device)
    plan = flash_mla.get_mla_metadata(lengths, problem.shape.heads, 1)
    q, cache = problem.q.unsqueeze(1), problem.cache.k.unsqueeze(2)

    def launch(i: int) -> Tensor:
        scale = problem.shape.scale
        o, _ = flash_mla.flash_mla_with_kvcache(q, cache, problem.tables[i], lengths, 512, *plan, softmax_scale=scale)
        return o.squeeze(1)

    return launch


def paged(problem: Problem) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every page table as FlashInfer's (indptr, page indices, tokens of each row's last page)."""
    pages = [-(-length // BLOCK) for length in problem.lengths]
    indptr = torch.tensor([sum(pages[:row]) for row in range(len(pages) + 1)], dtype=torch.int32)
    last = torch.tensor([(n - 1) % BLOCK + 1 for n in problem.lengths], dtype=torch.int32)
    for table in problem.tables:
        yield indptr, torch.cat([table[row, :n] for row, n in enumerate(pages)]), last


def workspace(problem: Problem) -> Tensor:
    """FlashInfer's scratch memory. Its wrappers of one problem run one after another and may share it."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=problem.q.device)


# --- Timing -----------------------------------------------------------------------------------------------------


def agree(runs: dict[str, Launch]) -> None:
    """All implementations compute the same, within bfloat16."""
    mine = runs["ours"](1).double()
    for name, launch in runs.items():
        error = float((launch(1).double() - mine).norm() / mine.norm())
        assert error <= 1e-2, f"{name} differs from ours by {error}"


def medians(runs: dict[str, Launch], sets: int, kv_bytes: int) -> dict[str, float]:
    """Microseconds of one launch of each, from graphs replayed in turn."""
    launches = sets * max(1, min(64, int(2000 / (kv_bytes / 3e6 + 5))) // sets)
    graphs = {name: captured(launch, sets, launches) for name, launch in runs.items()}
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(REPLAYS + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay:  # the first warms up
                seen[name].append(start.elapsed_time(end) * 1000 / launches)
    return {name: statistics.median(times) for name, times in seen.items()}


def captured(launch: Launch, sets: int, launches: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            launch(i % sets)
    return graph


if __name__ == "__main__":
    main()
