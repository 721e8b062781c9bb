"""Where the cp ranks of latent attention exchange their partials: in latent space, or after W_UV."""

from __future__ import annotations

from helixc.hardware import EXCHANGE_SHARE, GPUS, PROJECTION_SHARE
from helixc.spec.spec import Hardware, RoleSpec
from helixc_runtime.manifest import ModelArch, Space, Transport
from helixc_runtime.switches import read_switches

MEASURED_ON = "h200"  # stands for a GPU that is not named


def exchange_space(spec: RoleSpec, arch: ModelArch, hardware: Hardware) -> Space:
    """What the file says or, at max_batch_size, takes less time: fewer bytes to send, or less of W_UV to read.

    Whatever tp and cp are, for each head that a rank sends away it reads one head of W_UV more. So neither they nor
    the number of heads matter, nor the element type.
    """
    mla, cp = arch.mla, spec.context_parallel_size
    if mla is None:
        return "value"
    if cp == 1:
        return "latent"
    if spec.exchange_space != "auto":
        return spec.exchange_space
    gpu = GPUS[hardware.gpu or MEASURED_ON]
    link = gpu.nvlink * EXCHANGE_SHARE[transport(cp, hardware)]
    rows, latent, value = spec.max_batch_size, mla.kv_lora_rank, mla.v_head_dim
    saved = rows * (latent - value) / link  # elements a head, as those of W_UV, the partial and its product
    spent = (latent * value + rows * (latent + value)) / (gpu.bandwidth * PROJECTION_SHARE)
    return "value" if saved > spent else "latent"


def transport(cp: int, hardware: Hardware) -> Transport:
    """How cp ranks exchange, for estimates: as if no group were torn between two hosts that could sit on one."""
    return "one_sided" if cp <= hardware.gpus_per_node and not read_switches().collectives else "collective"
