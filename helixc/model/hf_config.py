"""Hugging Face's config.json -> ModelArch.

Files on the hub spell `rope_theta`, `rope_scaling`, `torch_dtype`; transformers 5 writes `rope_parameters`, `dtype`.
Both are read. What a model does not say gets the default that transformers gives it; what we cannot compute exactly
is refused by name rather than approximated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from helixc.model.builtin import CONFIGS
from helixc_runtime.manifest import Dtype, Mla, ModelArch, Moe, Rope

Config = dict[str, Any]


class ModelError(ValueError):
    """The model's geometry cannot be read. `help` says what to do."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.help = help


def is_builtin(model: str) -> bool:
    """Whether `model` names a built-in geometry rather than a checkpoint folder."""
    return model in CONFIGS


def read_model(model: str) -> ModelArch:
    """Geometry of a built-in name or of the checkpoint folder `model`. Raises ModelError."""
    config, folder = _config(model)
    names = config.get("architectures") or [None]
    reader = _READERS.get(names[0])
    if reader is None:
        raise ModelError(f"architecture {names[0]!r} is not supported", f"supported: {', '.join(_READERS)}")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {config['hidden_act']!r} is not supported", "only silu is")
    if config.get("mlp_bias"):
        raise ModelError("mlp_bias: true is not supported", "use a checkpoint without biases in its MLP")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"the checkpoint is quantized ({method})", "convert it to bfloat16 safetensors first")
    try:
        return reader(config, _eos(config, folder))
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}", f"{names[0]} needs it") from None


def native_dtype(model: str) -> Dtype:
    """The dtype the weights are stored in, as config.json says; bfloat16 for built-in geometries and where unsaid."""
    config, _ = _config(model)
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in get_args(Dtype):
        raise ModelError(f"dtype {name!r} is not supported", f"set `dtype:` to one of {', '.join(get_args(Dtype))}")
    return cast(Dtype, name)


def _config(model: str) -> tuple[Config, Path | None]:
    if is_builtin(model):
        return CONFIGS[model], None
    folder = Path(model)
    return _json(folder / "config.json"), folder


def _json(path: Path) -> Config:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "a checkpoint folder holds config.json") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "download the file again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object", "download the file again")
    return data


def _eos(config: Config, folder: Path | None) -> tuple[int, ...]:
    """generation_config.json, where it stands, knows the stop tokens better than config.json."""
    value = config.get("eos_token_id")
    if folder is not None and (folder / "generation_config.json").is_file():
        value = _json(folder / "generation_config.json").get("eos_token_id", value)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


# --- Rotary embedding -------------------------------------------------------------------------------------------


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope(config: Config, *, interleaved: bool, scale_softmax: bool) -> Rope:
    params: Config = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(params.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = params.get("rope_type") or params.get("type") or "default"
    if float(params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported", "the whole head must be rotated")
    if kind == "default":
        return Rope(theta=theta, interleaved=interleaved)
    original = int(params.get("original_max_position_embeddings") or config["max_position_embeddings"])
    factor = float(params.get("factor") or config["max_position_embeddings"] / original)
    if kind == "linear":
        return Rope(theta=theta, interleaved=interleaved, scaling="linear", factor=factor)
    if kind == "llama3":
        return Rope(
            theta=theta,
            interleaved=interleaved,
            scaling="llama3",
            factor=factor,
            original_max_position=original,
            low_freq_factor=float(params["low_freq_factor"]),
            high_freq_factor=float(params["high_freq_factor"]),
        )
    if kind != "yarn":
        raise ModelError(f"rope type {kind!r} is not supported", "supported: default, linear, llama3, yarn")
    return _yarn(params, theta, interleaved, original, factor, scale_softmax)


def _yarn(params: Config, theta: float, interleaved: bool, original: int, factor: float, scale_softmax: bool) -> Rope:
    mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
    attention = params.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
    return Rope(
        theta=theta,
        interleaved=interleaved,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=float(params.get("beta_fast") or 32),
        beta_slow=float(params.get("beta_slow") or 1),
        truncate=bool(params.get("truncate", True)),
        attention_factor=float(attention),
        softmax_factor=_mscale(factor, all_dim) ** 2 if scale_softmax and all_dim else 1.0,
    )


# --- One reader a family ----------------------------------------------------------------------------------------


def _arch(config: Config, eos: tuple[int, ...], **fields: Any) -> ModelArch:
    return ModelArch(
        architecture=config["architectures"][0],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        attention_bias=bool(config.get("attention_bias", False)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=eos,
        **fields,
    )


def _gqa(config: Config, eos: tuple[int, ...], *, qk_norm: bool, moe: Moe | None = None) -> ModelArch:
    heads = config["num_attention_heads"]
    default_dim = 128 if qk_norm else config["hidden_size"] // heads  # transformers' default for Qwen3 is 128
    return _arch(
        config,
        eos,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or default_dim,
        rope=_rope(config, interleaved=False, scale_softmax=False),
        mla=None,
        moe=moe,
        qk_norm=qk_norm,
    )


def _llama(config: Config, eos: tuple[int, ...]) -> ModelArch:
    return _gqa(config, eos, qk_norm=False)


def _qwen3(config: Config, eos: tuple[int, ...], moe: Moe | None = None) -> ModelArch:
    if config.get("use_sliding_window"):
        raise ModelError("use_sliding_window: true is not supported", "Helix shards full attention only")
    return _gqa(config, eos, qk_norm=True, moe=moe)


def _qwen3_moe(config: Config, eos: tuple[int, ...]) -> ModelArch:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)
    moe = Moe(
        layers=layers,
        experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        shared_intermediate_size=0,
        scoring="softmax",
        correction_bias=False,
        groups=1,
        top_groups=1,
        group_score="max",
        normalize=bool(config.get("norm_topk_prob", False)),
        scale=1.0,
    )
    return _qwen3(config, eos, moe)


def _mla_arch(config: Config, eos: tuple[int, ...], moe: Moe, *, interleaved: bool) -> ModelArch:
    mla = Mla(
        q_lora_rank=config.get("q_lora_rank"),
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
    )
    return _arch(
        config,
        eos,
        num_kv_heads=1,
        head_dim=mla.kv_lora_rank + mla.qk_rope_head_dim,
        rope=_rope(config, interleaved=interleaved, scale_softmax=True),
        mla=mla,
        moe=moe,
        qk_norm=False,
    )


def _moe_layers(config: Config) -> tuple[int, ...]:
    if config.get("moe_layer_freq", 1) != 1:
        raise ModelError("moe_layer_freq other than 1 is not supported", "all layers after the dense ones are MoE")
    return tuple(range(config["first_k_dense_replace"], config["num_hidden_layers"]))


def _deepseek_moe(config: Config, **routing: Any) -> Moe:
    """The sizes that V2 and V3 spell alike, with the routing of either."""
    return Moe(
        layers=_moe_layers(config),
        experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        shared_intermediate_size=config["moe_intermediate_size"] * config["n_shared_experts"],
        **routing,
    )


def _deepseek_v3(config: Config, eos: tuple[int, ...]) -> ModelArch:
    if config.get("scoring_func", "sigmoid") != "sigmoid":
        raise ModelError(f"scoring_func {config['scoring_func']!r} with DeepseekV3ForCausalLM", "V3 routes by sigmoid")
    moe = _deepseek_moe(
        config,
        scoring="sigmoid",
        correction_bias=True,
        groups=config["n_group"],
        top_groups=config["topk_group"],
        group_score="top2_sum",
        normalize=bool(config.get("norm_topk_prob", True)),
        scale=float(config["routed_scaling_factor"]),
    )
    return _mla_arch(config, eos, moe, interleaved=bool(config.get("rope_interleave", True)))


def _deepseek_v2(config: Config, eos: tuple[int, ...]) -> ModelArch:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"topk_method {method!r} is not supported", "supported: greedy, group_limited_greedy")
    if config.get("norm_topk_prob"):
        raise ModelError(
            "norm_topk_prob: true with DeepseekV2ForCausalLM", "published implementations disagree on what it scales"
        )
    limited = method == "group_limited_greedy"
    moe = _deepseek_moe(
        config,
        scoring="softmax",
        correction_bias=False,
        groups=config["n_group"] if limited else 1,
        top_groups=config["topk_group"] if limited else 1,
        group_score="max",
        normalize=False,
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )
    return _mla_arch(config, eos, moe, interleaved=True)


_READERS: dict[str, Callable[[Config, tuple[int, ...]], ModelArch]] = {
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "LlamaForCausalLM": _llama,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
