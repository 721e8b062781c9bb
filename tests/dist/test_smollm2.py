"""A real model: SmolLM2-135M-Instruct over three Helix ranks says what one transformers process says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from examples.smollm2 import convert
from helixc_runtime.manifest import Plan
from tests.deployments import plan_of, role
from tests.dist.harness import deploy, request

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-instruct"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
)


def test_greedy_text_is_identical(tmp_path: Path) -> None:
    convert(CHECKPOINT)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # 64 tokens, whatever comes
    plan: Plan = plan_of(str(CHECKPOINT), role(), role(cp=3, block=16))
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    outcome = deploy(plan, [request(i, ids, 64) for i, ids in enumerate(prompts)], tmp_path)
    for index, ids in enumerate(prompts):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
        assert tokenizer.decode(outcome.tokens[index]) == tokenizer.decode(expected)
