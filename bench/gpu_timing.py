"""Times on one GPU: CUDA graphs replayed in turn, and what the machine itself can do, measured in the same run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from helixc.codegen.nvrtc import Nvrtc
from helixc_runtime.cubin import LoadedKernel, device_arch

Launch = Callable[[int], object]  # enqueues the kernels of the i-th of several sets of inputs
REPLAYS = 9
L2_BYTES = 50 << 20  # of the largest GPU of compute capability 9.0
EMPTY = 'extern "C" __global__ void empty() {}'
# A plain read of pages, of up to four tensors (so many 16-byte vectors a page, 0: not there): what the memory can do.
# Launches overlap, as those of attention do; only the last words of each wait for the launch before.
READ = """
extern "C" __global__ void __launch_bounds__(512)
read_pages(const uint4* a, const uint4* b, const uint4* c, const uint4* d, const int* table, unsigned* sink, int in_a,
           int in_b, int in_c, int in_d, int pages) {
  asm volatile("griddepcontrol.launch_dependents;");
  const unsigned ab = in_a + in_b, abc = ab + in_c, all = abc + in_d, end = unsigned(pages) * all;
  unsigned sum = 0;
  for (unsigned first = blockIdx.x * 4096 + threadIdx.x; first < end; first += gridDim.x * 4096) {
    uint4 x[8];
    unsigned page[8], at[8];  // the last words are read several times
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = min(first + i * 512, end - 1), page[i] = table[at[i] / all];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned v = at[i] % all;
      const uint4* of = v < in_a ? a : v < ab ? b : v < abc ? c : d;
      const unsigned begin = v < in_a ? 0 : v < ab ? in_a : v < abc ? ab : abc;
      const unsigned count = v < in_a ? in_a : v < ab ? in_b : v < abc ? in_c : in_d;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[i].x), "=r"(x[i].y), "=r"(x[i].z), "=r"(x[i].w)
                   : "l"(of + (unsigned long long)page[i] * count + (v - begin)));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (sum == 0x12345678) *sink = sum;
}
"""
READ_ARGUMENTS = ("pointer",) * 6 + ("int32",) * 5


def medians(runs: Mapping[str, Launch], sets: int, launches: int) -> dict[str, float]:
    """Microseconds of one launch of each, from graphs of so many `launches` over `sets` of inputs."""
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
    """A graph of so many launches, each set warmed up first."""
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


def host_us(call: Callable[[], object], times: int = 300, batches: int = 9) -> float:
    """Microseconds that the host needs for `call`, enqueued without waiting; the GPU's queue holds about 1,000."""
    seen = []
    for batch in range(batches + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        if batch:
            seen.append((time.perf_counter() - start) * 1e6 / times)
    torch.cuda.synchronize()
    return statistics.median(seen)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a kernel of torch over 1 GiB; what the driver copies with is slower."""
    source = torch.zeros(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = medians({"copy": lambda i: torch.neg(source, out=target)}, 1, 8)
    return 2 * source.nbytes / (times["copy"] * 1e-6)


def compiled(
    text: str, name: str, arguments: tuple[str, ...], threads: int, folder: Path, early: bool = False
) -> LoadedKernel:
    """A kernel of the bench's own; `early`: see LoadedKernel."""
    from cuda.bindings import nvrtc

    device = torch.device("cuda", torch.cuda.current_device())
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"bench.cu", 0, [], [])
    flags = [f"-arch={device_arch(device)}".encode()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    cubin = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, cubin)
    path = folder / f"{name}.cubin"
    path.write_bytes(cubin)
    return LoadedKernel(path, name, arguments, threads, device, early=early)


def empty_kernel(folder: Path) -> LoadedKernel:
    """A kernel without work or arguments: what any launch costs."""
    return compiled(EMPTY, "empty", (), 32, folder)


def first_gpu() -> torch.device:
    """The GPU to measure on, made the current one."""
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def earlier_rows(path: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that the file at `path` has, if it is there and from the GPU and the versions of `result`."""
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    same = all(old[key] == result[key] for key in ("gpu", "versions"))
    return list(old["rows"]) if same else []


def machine() -> dict[str, Any]:
    """The GPU and the versions that a result was made with."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "nvrtc": Nvrtc().version},
    }
