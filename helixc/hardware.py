"""GPUs that a deployment may name: memory, bandwidth and links. docs/hardware.md says where the figures come from."""

from __future__ import annotations

from dataclasses import dataclass

from helixc_runtime.manifest import Transport

DEFAULT_GPUS_PER_NODE = 8
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU in the servers it is sold in. Speeds are peak figures, bandwidths in bytes a second."""

    name: str
    memory: int  # bytes that a program can allocate
    bandwidth: float  # of the memory
    bfloat16: float  # dense tensor-core operations a second
    nvlink: float  # to the other GPUs of its NVLink domain, one direction
    network: float  # to other domains, one direction
    gpus_per_node: int
    domain: int  # GPUs of one NVLink domain
    arch: str  # what its kernels are compiled for


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 79 * GIB, 3.35e12, 990e12, 450e9, 50e9, 8, 8, "sm_90a"),
        Gpu("h200", 139 * GIB, 4.8e12, 990e12, 450e9, 50e9, 8, 8, "sm_90a"),
        Gpu("b200", 178 * GIB, 7.7e12, 2250e12, 900e9, 50e9, 8, 8, "sm_100a"),
        Gpu("gb200", 184 * GIB, 8.0e12, 2500e12, 900e9, 50e9, 4, 72, "sm_100a"),
        Gpu("gb300", 275 * GIB, 8.0e12, 2500e12, 900e9, 100e9, 4, 72, "sm_103a"),
    )
}

# Bytes that a rank sends to all others of its group, up to which a sum in one shot beats NCCL's all-reduce. Between two
# H200 it takes half as long even for 14 MB (bench/exchange.py); more ranks, which favour NCCL, are not measured.
ONE_SHOT_BYTES = 8 << 20
# Parts of the peak bandwidths: of NVLink that a larger exchange of partials reaches (two H200: bench/exchange.py), and
# of the memory that the product with W_UV reaches (H100: bench/ffn.py).
EXCHANGE_SHARE: dict[Transport, float] = {"one_sided": 0.70, "collective": 0.14}
PROJECTION_SHARE = 0.70
# Seconds that an exchange takes with hardly any rows (two H200), and attention with hardly any tokens (H100).
EXCHANGE_START: dict[Transport, float] = {"one_sided": 2.7e-6, "collective": 25e-6}
ATTENTION_START = {"mla": 9e-6, "gqa": 6e-6}
# Parts of the peak bandwidth and tensor-core rate that attention reaches with more tokens (H100: bench/attention.py).
ATTENTION_READ_SHARE, ATTENTION_OPERATIONS_SHARE = 0.85, 0.57
PROCESSORS = 132  # multiprocessors of a Hopper GPU; others are not measured
JOIN = 2e-6  # seconds until a kernel starts that waits for two streams: an assumption
