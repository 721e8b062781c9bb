"""Every weight of a model: its checkpoint tensor, its shape, and the axis each dim is sharded along.

The runtime's name of a weight never changes with the layout; the checkpoint's name is Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from helixc_runtime.manifest import Mla, ModelArch, Moe

Axis = Literal["q_heads", "kv_heads", "out_heads", "value_heads", "ffn", "shared_ffn", "moe_ffn", "vocab"]
Stage = Literal["first", "last", "layer"]


@dataclass(frozen=True, slots=True)
class Dim:
    """`size` elements of the whole tensor, `unit` of which belong to one index of `axis`.

    axis None: every rank takes `window` (the whole dim unless given).
    """

    size: int
    axis: Axis | None = None
    unit: int = 1
    window: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight, or one family of weights: per layer, per layer and expert, or on the first or last stage only."""

    name: str
    tensor: str
    dims: tuple[Dim, ...]
    stage: Stage = "layer"
    layers: tuple[int, ...] | None = None
    per_expert: bool = False


def parameters(arch: ModelArch) -> tuple[Parameter, ...]:
    """All weights of the model, in load order."""
    everywhere = tuple(range(arch.num_layers))
    hidden, vocab = Dim(arch.hidden_size), Dim(arch.vocab_size, "vocab")
    head = "model.embed_tokens.weight" if arch.tie_embeddings else "lm_head.weight"
    return (
        Parameter("embed", "model.embed_tokens.weight", (vocab, hidden), "first"),
        *_layer("input_norm", "input_layernorm.weight", everywhere, hidden),
        *(_mla(arch, arch.mla, everywhere) if arch.mla else _gqa(arch, everywhere)),
        *_layer("post_norm", "post_attention_layernorm.weight", everywhere, hidden),
        *_mlp("mlp", "mlp", arch, tuple(i for i in everywhere if not arch.is_moe(i)), arch.intermediate_size, "ffn"),
        *(_moe(arch, arch.moe) if arch.moe else ()),
        Parameter("norm", "model.norm.weight", (hidden,), "last"),
        Parameter("head", head, (vocab, hidden), "last"),
    )


def _layer(name: str, tensor: str, layers: tuple[int, ...], *dims: Dim) -> Iterator[Parameter]:
    if layers:
        yield Parameter(name, f"model.layers.{{layer}}.{tensor}", dims, layers=layers)


def _gqa(arch: ModelArch, layers: tuple[int, ...]) -> Iterator[Parameter]:
    hidden, d = Dim(arch.hidden_size), arch.head_dim
    q = Dim(arch.num_heads * d, "q_heads", d)
    kv = Dim(arch.num_kv_heads * d, "kv_heads", d)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield from _layer(name, f"self_attn.{name}_proj.weight", layers, rows, hidden)
        if arch.attention_bias:
            yield from _layer(f"{name}_bias", f"self_attn.{name}_proj.bias", layers, rows)
    if arch.qk_norm:
        yield from _layer("q_norm", "self_attn.q_norm.weight", layers, Dim(d))
        yield from _layer("k_norm", "self_attn.k_norm.weight", layers, Dim(d))
    yield from _output(arch, layers, d)


def _mla(arch: ModelArch, mla: Mla, layers: tuple[int, ...]) -> Iterator[Parameter]:
    hidden, latent = Dim(arch.hidden_size), Dim(mla.kv_lora_rank)
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    q = Dim(arch.num_heads * qk, "q_heads", qk)
    kv_a = Dim(mla.kv_lora_rank + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        yield from _layer("q", "self_attn.q_proj.weight", layers, q, hidden)
    else:
        rank = Dim(mla.q_lora_rank)
        yield from _layer("q_a", "self_attn.q_a_proj.weight", layers, rank, hidden)
        if arch.attention_bias:
            yield from _layer("q_a_bias", "self_attn.q_a_proj.bias", layers, rank)
        yield from _layer("q_a_norm", "self_attn.q_a_layernorm.weight", layers, rank)
        yield from _layer("q_b", "self_attn.q_b_proj.weight", layers, q, rank)
    yield from _layer("kv_a", "self_attn.kv_a_proj_with_mqa.weight", layers, kv_a, hidden)
    if arch.attention_bias:
        yield from _layer("kv_a_bias", "self_attn.kv_a_proj_with_mqa.bias", layers, kv_a)
    yield from _layer("kv_a_norm", "self_attn.kv_a_layernorm.weight", layers, latent)
    # kv_b_proj viewed as [heads, nope + v, latent]: W_UK of the heads attended, W_UV of those or of the heads held
    # after the exchange.
    nope, width = mla.qk_nope_head_dim, mla.qk_nope_head_dim + mla.v_head_dim
    k_rows, v_rows = Dim(width, window=(0, nope)), Dim(width, window=(nope, width))
    kv_b = "self_attn.kv_b_proj.weight"
    yield from _layer("k_up", kv_b, layers, Dim(arch.num_heads, "q_heads"), k_rows, latent)
    yield from _layer("v_up", kv_b, layers, Dim(arch.num_heads, "value_heads"), v_rows, latent)
    yield from _output(arch, layers, mla.v_head_dim)


def _output(arch: ModelArch, layers: tuple[int, ...], v_dim: int) -> Iterator[Parameter]:
    hidden, rows = Dim(arch.hidden_size), Dim(arch.num_heads * v_dim, "out_heads", v_dim)
    yield from _layer("o", "self_attn.o_proj.weight", layers, hidden, rows)
    if arch.attention_bias:
        yield from _layer("o_bias", "self_attn.o_proj.bias", layers, hidden)


def _mlp(
    name: str, tensor: str, arch: ModelArch, layers: tuple[int, ...], size: int, axis: Axis
) -> Iterator[Parameter]:
    hidden, inner = Dim(arch.hidden_size), Dim(size, axis)
    yield from _layer(f"{name}_gate", f"{tensor}.gate_proj.weight", layers, inner, hidden)
    yield from _layer(f"{name}_up", f"{tensor}.up_proj.weight", layers, inner, hidden)
    yield from _layer(f"{name}_down", f"{tensor}.down_proj.weight", layers, hidden, inner)


def _moe(arch: ModelArch, moe: Moe) -> Iterator[Parameter]:
    hidden, inner = Dim(arch.hidden_size), Dim(moe.intermediate_size, "moe_ffn")
    yield from _layer("router", "mlp.gate.weight", moe.layers, Dim(moe.experts), hidden)
    if moe.correction_bias:
        yield from _layer("router_bias", "mlp.gate.e_score_correction_bias", moe.layers, Dim(moe.experts))
    if moe.shared_intermediate_size:
        size = moe.shared_intermediate_size
        yield from _mlp("shared", "mlp.shared_experts", arch, moe.layers, size, "shared_ffn")
    expert = "model.layers.{layer}.mlp.experts.{expert}."
    for name, dims in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield Parameter(f"expert_{name}", f"{expert}{name}_proj.weight", dims, layers=moe.layers, per_expert=True)
