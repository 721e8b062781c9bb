"""`helixc init --from-vllm`: vLLM's flags come out as the same GPUs under Helix's sizes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from helixc.cli import main
from helixc.frontend import analyse_input
from helixc.inputs import Input
from helixc.spec.spec import Spec
from helixc.spec.vllm import from_vllm
from helixc.spec.vllm_flags import VllmError


def spec_of(flags: str) -> Spec:
    analysis = analyse_input(Input("deployment.yaml", from_vllm(flags, "llama-3.1-8b")))
    assert analysis.ok and analysis.spec is not None, analysis.diagnostics
    return analysis.spec


def test_dcp_reuses_the_ranks_of_tp() -> None:
    """tp * cp is vLLM's tp, whatever part of it dcp takes."""
    for _ in range(20):
        tp = random.choice([1, 2, 4, 8])
        dcp = random.choice([d for d in (1, 2, 4, 8) if tp % d == 0])
        pp = random.choice([1, 2, 4])
        generation = spec_of(f"-tp {tp} -dcp {dcp} --pipeline-parallel-size={pp}").generation
        assert generation.tensor_parallel_size * generation.context_parallel_size == tp
        assert (generation.context_parallel_size, generation.pipeline_parallel_size) == (dcp, pp)


def test_the_comments_explain_the_difference() -> None:
    words = " ".join(from_vllm("vllm serve deepseek-ai/DeepSeek-R1 -tp 8 -dcp 8", "x").replace("#", "").split())
    assert "reuses tensor-parallel ranks" in words
    assert "the same 8 GPUs are tp1 cp8" in words and "would ask for 64" in words
    assert "cp" not in from_vllm("-tp 1", "llama-3.1-8b").split("parallelism:")[1]


def test_the_other_flags() -> None:
    text = """vllm serve Qwen/Qwen3-235B-A22B --tensor_parallel_size=4 -dcp 2 -ep --max-model-len 128K --max-num-seqs 16
        --block-size 64 --dtype half --gpu-memory-utilization 0.85 --seed 3 --enforce-eager --port 80"""
    spec = spec_of(text)
    assert (spec.model, spec.dtype, spec.seed) == ("qwen3-235b-a22b", "float16", 3)
    assert (spec.generation.max_seq_len, spec.generation.max_batch_size) == (131_072, 16)
    assert spec.generation.moe_expert_parallel_size == 4
    assert (spec.generation.tokens_per_block, spec.generation.free_gpu_memory_fraction) == (64, 0.85)
    assert spec.hardware.share_gpus and spec.context is not None and spec.context.tensor_parallel_size == 4
    left_out = from_vllm(text, "x").split("Not translated:")[1]
    assert "--enforce-eager" in left_out and "--port" in left_out


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("-dp 8 -ep", {"num_instances": 1, "tensor_parallel_size": 8, "enable_attention_dp": True}),
        ("-dp 2 -tp 4", {"num_instances": 2, "tensor_parallel_size": 4, "enable_attention_dp": False}),
        ("-dp 2 -tp 4 -dcp 4 -ep", {"num_instances": 2, "context_parallel_size": 4, "moe_expert_parallel_size": 4}),
        ("-tp 4 -dcp 4 --dcp-kv-cache-interleave-size 16", {"tokens_per_block": 16, "context_parallel_size": 4}),
        ("-tp 2 --kv-cache-dtype fp8", {"kv_dtype": "fp8"}),
        ("-tp 2 --kv-cache-dtype fp8_e4m3", {"kv_dtype": "fp8"}),
        ("-tp 2 --kv-cache-dtype half", {"kv_dtype": "float16"}),
        ("-tp 2 --kv-cache-dtype auto", {"kv_dtype": "auto"}),
        ("-tp 2 --kv-cache-dtype fp8_e5m2", {"kv_dtype": "auto"}),
        ("-tp 2 --kv-cache-dtype bfloat16", {"kv_dtype": "bfloat16"}),
    ],
)
def test_sizes(flags: str, sizes: dict[str, object]) -> None:
    generation = spec_of(f"deepseek-v3-lite {flags}").generation
    assert {key: getattr(generation, key) for key in sizes} == sizes


@pytest.mark.parametrize(("dtype", "left_out"), [("fp8", False), ("fp8_e5m2", True), ("nvfp4", True), ("auto", False)])
def test_a_cache_type_without_kernels_is_said(dtype: str, left_out: bool) -> None:
    text = from_vllm(f"llama-3.1-8b --kv-cache-dtype {dtype}", "x")
    assert (f"no kernels for {dtype}; this is planned in the model's dtype" in text) == left_out
    assert from_vllm("llama-3.1-8b --dtype fp8", "x").endswith(
        "no kernels for fp8; this is planned in the model's dtype\n"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("-tp 8 -dcp 3", "does not divide"),
        ("--tensor-paralel-size 8", "did you mean `--tensor-parallel-size`"),
        ("-tq 8", "is not known"),
        ("-tp", "needs a value"),
        ("-tp -dcp 8", "needs a value"),
        ("-tp two", "whole number"),
        ("-tp 0", "whole number"),
        ("model -tp 8 other", "stands alone"),
        ("-tp '8", "split into words"),
    ],
)
def test_flags_that_cannot_be_translated(flags: str, words: str) -> None:
    with pytest.raises(VllmError, match=words):
        from_vllm(flags, "llama-3.1-8b")


def test_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deployment.yaml"
    assert main(["init", str(file), "--from-vllm", "-tp 8 -dcp 8"]) == 0
    assert main(["check", "--strict", str(file)]) == 0
    assert main(["init", str(file), "--from-vllm", "-tp 8 -dcp 8"]) == 2, "nothing is overwritten"
    assert main(["init", "-", "--from-vllm", "-tp 8 -dcp 5"]) == 2
    assert "does not divide" in capsys.readouterr().err
    assert main(["init", "-", "--from-vllm", "some/model -tp 8 -dcp 8"]) == 1
    shown = capsys.readouterr()
    assert 'model: "some/model"' in shown.out and "HX401" in shown.err
