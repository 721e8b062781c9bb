"""Make a tiny random checkpoint in Hugging Face form, to try any of the supported architectures in seconds.

    python examples/tiny_checkpoint.py deepseek-v3-lite --out checkpoints/tiny-deepseek-v3-lite

The geometry is small but has every feature of its family: latent attention, grouped routing with a correction bias,
shared experts, a dense first layer, yarn and llama3 rope scaling, query and key norms. 24 query heads and 24 experts
split over 1, 2, 3, 4, 6, 8, 12 or 24 ranks. A byte-level tokenizer without merges comes along: one token a byte.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BYTES = 256
VOCAB = 264  # 24 * 11: an even LM-head shard on every mapping the head count allows
BOS, EOS = BYTES, BYTES + 1
MAX_POSITION = 4096

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 24,
    "max_position_embeddings": MAX_POSITION,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,  # differs from every other width, so that a mixed-up dim is an error
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 24,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
# The original length is far below the lengths of tests, so that every rope dim is interpolated, blended or kept.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 128,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000000.0}


@dataclass(frozen=True, slots=True)
class Family:
    """A transformers configuration class, its causal model and the tiny geometry."""

    config: str
    model: str
    geometry: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "deepseek-v3-lite": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _SIZES
        | _MLA
        | _ROUTED
        | {
            "q_lora_rank": None,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": _YARN,
            "num_nextn_predict_layers": 0,
        },
    ),
    "deepseek-v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _SIZES
        | _MLA
        | _ROUTED
        | {
            "q_lora_rank": 48,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.0,
            "rope_parameters": _YARN,
        },
    ),
    "llama": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        _SIZES | {"num_key_value_heads": 6, "head_dim": 16, "rope_parameters": _LLAMA3},
    ),
    "qwen3": Family(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        _SIZES | {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": _PLAIN},
    ),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _SIZES
        | {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_experts": 24,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "rope_parameters": _PLAIN,
        },
    ),
}


def make_checkpoint(family: str, out: Path, *, seed: int, layers: int = 4, **config_overrides: Any) -> Path:
    """Write a random float32 checkpoint of `family` to the folder `out` and return it.

    `config_overrides` are fields of the family's transformers configuration. The same arguments give the same weights.
    Raises ValueError for an unknown family or an override the configuration has no field for, and FileExistsError
    if `out` holds anything: nothing is ever replaced.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: remove it or choose another folder")
    model = _random_model(FAMILIES[family], seed, {"num_hidden_layers": layers} | config_overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "checkpoint"
        model.save_pretrained(folder)
        _save_tokenizer(folder, model.config.vocab_size)
        folder.rename(out)
    return out


def _random_model(family: Family, seed: int, overrides: dict[str, Any]) -> Any:
    config_class = getattr(transformers, family.config)
    known = family.geometry.keys() | set(config_class().to_dict()) | set(config_class.attribute_map)
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"{family.config} has no field {unknown[0]!r}")
    model = getattr(transformers, family.model)(config_class(**family.geometry | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            _fill(name, tensor, generator)
    return model.eval()


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random values such that activations stay near 1, logits vary by about 1 and no tensor is close to trivial."""
    if name.endswith("e_score_correction_bias"):
        tensor.normal_(0.0, 0.2, generator=generator)
    elif name.endswith("bias"):
        tensor.normal_(0.0, 0.1, generator=generator)
    elif name.endswith("norm.weight"):
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith("embed_tokens.weight"):
        tensor.normal_(0.0, 0.3, generator=generator)
    else:
        gain = 2.0 if name.endswith("mlp.gate.weight") else 1.0
        tensor.normal_(0.0, gain * tensor.shape[-1] ** -0.5, generator=generator)


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer.json whose first 256 tokens are the bytes; the others are special. Nothing is added to a prompt."""
    byte_characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {BOS: "<|begin|>", EOS: "<|end|>"}
    tokenizer.add_special_tokens([named.get(i, f"<|reserved_{i}|>") for i in range(BYTES, vocab_size)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": named[BOS], "eos_token": named[EOS]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _byte_characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte value, in order of the value."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(BYTES) if b not in printable]
    return [chr(b) if b in printable else chr(BYTES + others.index(b)) for b in range(BYTES)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a tiny random checkpoint in Hugging Face form.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        out = make_checkpoint(args.family, args.out, seed=args.seed, layers=args.layers)
    except (ValueError, FileExistsError) as error:
        print(f"tiny_checkpoint: {error}", file=sys.stderr)
        return 1
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: {args.family}, {args.layers} layers, seed {args.seed}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
