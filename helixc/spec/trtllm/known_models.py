"""Model names of the wild to built-in geometries: `DeepSeek-V3-Lite/bf16`, `meta-llama/Llama-3.1-8B-Instruct`, ..."""

from __future__ import annotations

import re

_GAP = "[-_. ]?"
_PATTERNS: tuple[tuple[str, str], ...] = (
    (f"deepseek{_GAP}v3{_GAP}lite", "deepseek-v3-lite"),
    (f"deepseek{_GAP}v2{_GAP}lite", "deepseek-v2-lite"),
    (f"deepseek{_GAP}r1(?!{_GAP}(?:distill|zero-distill))", "deepseek-r1"),
    (f"deepseek{_GAP}v3(?:\\.1)?(?![.\\d])", "deepseek-v3"),
    (f"kimi{_GAP}k2(?![.\\d])", "kimi-k2"),
    (f"llama{_GAP}3[._]1{_GAP}8b", "llama-3.1-8b"),
    (f"llama{_GAP}3[._][13]{_GAP}70b", "llama-3.1-70b"),
    (f"llama{_GAP}3[._]1{_GAP}405b", "llama-3.1-405b"),
    (f"tiny{_GAP}llama{_GAP}1\\.1b", "tinyllama-1.1b"),
    (f"qwen3{_GAP}8b", "qwen3-8b"),
    (f"qwen3{_GAP}32b", "qwen3-32b"),
    (f"qwen3{_GAP}235b{_GAP}a22b", "qwen3-235b-a22b"),
)
_QUANTISED = re.compile(r"(?<![a-z0-9])(nvfp4|mxfp4|fp4|fp8|int4|int8|awq|gptq|w4a\d+|w8a8)(?![a-z0-9])")


def builtin_like(name: str) -> str | None:
    """The built-in geometry that a path or hub name names, or None."""
    lower = name.lower()
    return next((known for pattern, known in _PATTERNS if re.search(pattern, lower)), None)


def quantisation(name: str) -> str | None:
    """The short type that a model's name announces, such as fp8, or None."""
    found = _QUANTISED.search(name.lower())
    return None if found is None else found[1]
