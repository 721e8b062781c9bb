"""Prompts, requests and tokenizers: what users write, and what they are told when it cannot work."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from helixc.launch import LaunchError, LaunchOptions
from helixc.launch.prompts import Prompt, read_prompts
from helixc.launch.requests import make_requests
from helixc.launch.tokenizer import TextStream, Tokenizer, TokenizerError, load_tokenizer
from tests.unit.launch_deployment import deployment


def read_file(path: Path, content: str | bytes, **options: object) -> tuple[Prompt, ...]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(LaunchOptions(prompts_file=path, **options))  # type: ignore[arg-type]


def test_prompts_take_what_they_do_not_say_from_the_options(tmp_path: Path) -> None:
    ids = random.choices(range(100), k=6)
    lines = [
        {"prompt": "Grüße", "max_tokens": 3, "temperature": 1, "top_p": 0.5, "seed": 7, "ignore_eos": True},
        {"token_ids": ids},
    ]
    content = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\r\n"
    first, second = read_file(tmp_path / "p.jsonl", content, max_tokens=9, seed=2)
    assert first == Prompt(f"{tmp_path / 'p.jsonl'}:1", "Grüße", None, 3, 1.0, 0.5, 7, True)
    assert second == Prompt(f"{tmp_path / 'p.jsonl'}:3", None, tuple(ids), 9, 0.0, 1.0, 2, False)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a"', "not JSON: .* at column"),
        ('"text"', 'expected an object .*, got "text"'),
        ('{"promt": "a"}', "unknown key 'promt'; the keys are prompt, token_ids, max_tokens"),
        ('{"prompt": "a", "prompt": "b"}', "key 'prompt' is given twice"),
        ('{"max_tokens": 3}', "either prompt .* or token_ids, found neither"),
        ('{"prompt": "a", "token_ids": [1]}', "found both"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": 3}', "prompt: expected text, got 3"),
        ('{"prompt": "\\ud800"}', "not valid Unicode at character 1"),
        ('{"token_ids": []}', "token_ids is empty"),
        ('{"token_ids": 5}', "expected an array of whole numbers, got 5"),
        ('{"token_ids": [1, true]}', r"token_ids\[1\]: expected a whole number, got true"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: expected a whole number of at least 1, got 0"),
        ('{"prompt": "a", "max_tokens": "8"}', 'max_tokens: .*, got "8"'),
        ('{"prompt": "a", "temperature": NaN}', "temperature: expected a number of at least 0"),
        ('{"prompt": "a", "top_p": 0}', "top_p: expected a number above 0 and at most 1, got 0"),
        ('{"prompt": "a", "seed": -1}', "seed: expected a whole number"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos: expected true or false, got 1"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "not a prompt"),
        ("[" * 100_000, "not (a prompt|JSON)"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(LaunchError, match=told) as error:
        read_file(tmp_path / "p.jsonl", '{"prompt": "fine"}\n' + line + "\n")
    assert error.value.messages[0].startswith(f"{tmp_path / 'p.jsonl'}:2: ") and len(error.value.messages) == 1


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as error:
        read_file(tmp_path / "p.jsonl", b'{"prompt": ""}\n{}\n{"prompt": "a"}\n{"prompt": "\xff"}\n')
    sources = [m.partition(": ")[0].rpartition(":")[2] for m in error.value.messages]
    assert sources == ["1", "2", "4"] and "not UTF-8: byte 0xff at column 13" in error.value.messages[2]


def test_where_prompts_come_from(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="neither was given"):
        read_prompts(LaunchOptions())
    with pytest.raises(LaunchError, match="both were given"):
        read_prompts(LaunchOptions(prompts=("a",), prompts_file=tmp_path))
    with pytest.raises(LaunchError, match="cannot read the prompts"):
        read_prompts(LaunchOptions(prompts_file=tmp_path / "missing"))
    with pytest.raises(LaunchError, match="holds no prompts"):
        read_file(tmp_path / "p.jsonl", "\n \n")
    with pytest.raises(LaunchError, match="--prompt 2: the prompt is empty"):
        read_prompts(LaunchOptions(prompts=("a", "")))


def ids_prompt(count: int, max_tokens: int = 8) -> Prompt:
    return Prompt("p:1", None, tuple(random.choices(range(1000), k=count)), max_tokens, 0.0, 1.0, 0, False)


def test_requests_fit_the_deployment() -> None:
    plan, options = deployment(max_seq_len=256), LaunchOptions()
    prompts = [ids_prompt(240, 16), ids_prompt(1, 255)]
    requests = make_requests(plan, prompts, None, options)
    assert [r.index for r in requests] == [0, 1]
    assert [r.token_ids for r in requests] == [p.token_ids for p in prompts]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (ids_prompt(200, 57), r"200 prompt tokens \+ max_tokens 57 = 257 exceed .*\(256\); lower max_tokens to 56, or"),
        (ids_prompt(241, 1), r"prompt's 241 tokens exceed context_servers.max_seq_len \(240\); shorten it"),
        (replace(ids_prompt(1), token_ids=(5, 128256)), r"token_ids\[1\] is 128256, outside the vocabulary"),
        (replace(ids_prompt(1), token_ids=(-1,)), r"token_ids\[0\] is -1, outside the vocabulary of 128256"),
    ],
)
def test_what_the_deployment_cannot_serve(prompt: Prompt, told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        make_requests(deployment(max_seq_len=256), [ids_prompt(3), prompt], None, LaunchOptions())


def test_a_request_must_fit_the_kv_cache_alone() -> None:
    plan = deployment(cp=2, max_tokens=64)
    assert make_requests(plan, [ids_prompt(120, 8)], None, LaunchOptions())
    with pytest.raises(LaunchError, match=r"129 tokens need 96 in the KV cache of rank 1 .* holds 64; raise"):
        make_requests(plan, [ids_prompt(121, 8)], None, LaunchOptions())


def test_without_context_instances_nothing_can_prefill() -> None:
    with pytest.raises(LaunchError, match=r"no context instances.*compile again"):
        make_requests(deployment(context_instances=0), [ids_prompt(3)], None, LaunchOptions())


# --- Tokenizers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a byte-level tokenizer of a few merges, that begins every text with <s>."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, then the other cat"] * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)  # what a training run may leave behind
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_streamed_pieces_join_to_the_text_and_hold_whole_characters(checkpoint: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_waits_and_shows_only_when_nothing_follows(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    face = tokenizer.encode("a😀")[1:]
    assert len(face) == 5
    stream = TextStream(tokenizer)
    assert [stream.push(t) for t in face] == ["a", "", "", "", "😀"]
    stream = TextStream(tokenizer)
    assert [stream.push(t) for t in face[:3]] == ["a", "", ""]
    assert set(stream.finish()) == {"\ufffd"}


def test_a_missing_or_broken_tokenizer_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in (None, str(tmp_path)):
        with pytest.raises(TokenizerError, match="use --prompts with token_ids"):
            load_tokenizer(checkpoint)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="tokenizers is not installed"):
        load_tokenizer(str(tmp_path))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m.content }}]\n    {% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize("form", ["file", "text", "list"])
def test_chat_renders_the_checkpoints_template(checkpoint: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    config: dict[str, object] = {"bos_token": {"content": "<s>"}}
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        config["chat_template"] = TEMPLATE if form == "text" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = load_tokenizer(str(tmp_path)).encode_chat("the cat")
    tokenizer = load_tokenizer(str(tmp_path))
    assert ids.count(0) == 1 and tokenizer.decode(ids) == "[the cat]\n>"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "has no chat template; leave --chat out"),
        ("{{ raise_exception('no user first') }}", "the chat template failed: no user first"),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed"),
        ("{% if %}", "the chat template failed"),
    ],
)
def test_a_chat_template_that_cannot_be_used(tmp_path: Path, checkpoint: Path, template: str | None, told: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    prompt = replace(ids_prompt(1), token_ids=None, text="hi")
    tokenizer: Tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(LaunchError, match=told):
        make_requests(deployment(), [prompt], tokenizer, LaunchOptions(chat=True))
