"""Sound files to start from: native ones in both forms, and those of TensorRT-LLM that the tests hold."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "trtllm-configs"

_NATIVE = (
    "model: llama-3.1-8b\nload_format: dummy\nparallelism: ctx tp2 / gen 2x tp2 cp4\n",
    "model: deepseek-v3-lite\nload_format: dummy\nparallelism: ctx tp1 / gen tp1 cp2 ep2 dp\nmax_batch_size: 4\n",
    """model: qwen3-235b-a22b
load_format: dummy
dtype: bfloat16
seed: 3
hardware: {gpu: h200, nodes: 2, gpus_per_node: 8, share_gpus: true}
max_seq_len: 4096
context_servers: {tensor_parallel_size: 4, pipeline_parallel_size: 2, pp_partition: [48, 46]}
generation_servers:
  num_instances: 1
  tensor_parallel_size: 2
  context_parallel_size: 4
  moe_expert_parallel_size: 8
  cp_config: {cp_type: HELIX, tokens_per_block: 32}
  kv_cache_config: {tokens_per_block: 32, dtype: auto, max_tokens: 65536, free_gpu_memory_fraction: 0.8}
""",
    "model: kimi-k2\nload_format: dummy\ntensor_parallel_size: 1 # helixc: ignore[HX305] why not\n"
    "generation_servers: &g {context_parallel_size: 8}\ncontext_servers: {<<: *g, context_parallel_size: 1}\n",
)


def seeds() -> list[tuple[str, str]]:
    """(name, text) of every seed."""
    files = sorted(DATA.glob("*.y*ml"))
    return [(f"native{n}.yaml", text) for n, text in enumerate(_NATIVE)] + [(f.name, f.read_text()) for f in files]
