"""From a file to a Spec: strict types, the short form, inheritance, and findings that stand where the mistake is."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import yaml

from helixc import checks
from helixc.diagnostics import Diagnostic, has_errors
from helixc.model import read_model
from helixc.spec.document import parse_yaml
from helixc.spec.parse import parse
from helixc.spec.schema import Document, HardwareSection, KvCacheConfig
from helixc.spec.source import LineTable, load
from helixc.spec.spec import RoleSpec, Spec

LONG = Path(__file__).parent / "specs" / "long.yaml"
HEAD = "model: llama-3.1-8b\nload_format: dummy\n"


def findings_of(text: str, path: str = "f.yaml") -> tuple[Spec | None, list[Diagnostic]]:
    source, syntax = parse_yaml(path, text)
    assert source is not None and not syntax, syntax
    parsed = parse(source)
    return parsed.spec if parsed.sizes_known else None, parsed.findings


def spec_of(text: str, path: str = "f.yaml") -> Spec:
    spec, findings = findings_of(text, path)
    assert spec is not None and not findings, findings
    return spec


def only(text: str) -> tuple[Diagnostic, str]:
    """The only finding and the characters it points at."""
    _, findings = findings_of(text)
    (finding,) = findings
    return finding, LineTable.of("f.yaml", text).at(finding.span)


def test_the_long_form() -> None:
    source, _ = load(LONG)
    assert source is not None
    parsed = parse(source)
    spec, findings = parsed.spec, parsed.findings
    assert not findings and spec is not None and spec.context is not None
    assert (spec.model, spec.load_format, spec.dtype, spec.seed) == ("deepseek-v3-lite", "dummy", "bfloat16", 0)
    assert dataclasses.astuple(spec.hardware) == (1, 2, True, None)
    assert spec.context == RoleSpec(1, 2, 1, 1, None, None, None, False, 16, 4096, 64, "auto", None, 0.8, "auto", None)
    assert spec.generation == RoleSpec(
        1, 1, 1, 2, None, None, None, False, 4, None, 64, "auto", 8192, 0.8, "auto", None
    )


def test_the_short_form_means_the_long_form() -> None:
    chooser = random.Random()
    for _ in range(20):
        tp, pp, cp, ep, moe_tp, count = (chooser.randrange(1, 65) for _ in range(6))
        tokens = [f"tp{tp}", f"pp{pp}", f"cp{cp}", f"ep{ep}", f"moe_tp{moe_tp}", f"{count}x", "dp"]
        chooser.shuffle(tokens)
        roles = [f"ctx {count}x tp{pp}", f"gen {' '.join(tokens)}"]
        chooser.shuffle(roles)
        short = spec_of(f"{HEAD}parallelism: {' / '.join(roles)}\n")
        long = f"""{HEAD}context_servers: {{num_instances: {count}, tensor_parallel_size: {pp}}}
generation_servers:
  num_instances: {count}
  tensor_parallel_size: {tp}
  pipeline_parallel_size: {pp}
  context_parallel_size: {cp}
  moe_expert_parallel_size: {ep}
  moe_tensor_parallel_size: {moe_tp}
  enable_attention_dp: true
"""
        assert short == spec_of(long)
        assert short == spec_of(f"{long}parallelism: {' / '.join(roles)}\n")


def test_defaults_and_absent_roles() -> None:
    spec = spec_of(f"{HEAD}parallelism: gen cp2\n")
    assert spec.context is None
    assert spec.generation == RoleSpec(
        1, 1, 1, 2, None, None, None, False, 8, None, 32, "auto", None, 0.9, "auto", None
    )
    assert dataclasses.astuple(spec.hardware) == (None, 8, False, None)
    assert spec_of(f"{HEAD}generation_servers: {{}}\ncontext_servers: {{num_instances: 0}}\n").context is None
    assert spec_of(f"{HEAD}parallelism: ctx 0x tp2 / gen tp1\n").context is None


def test_inheritance_is_key_by_key() -> None:
    spec = spec_of(
        f"""{HEAD}max_batch_size: 3
tensor_parallel_size: 2
kv_cache_config: {{dtype: float16, max_tokens: 100, free_gpu_memory_fraction: 1}}
cp_config: {{exchange_space: value, hop_groups: 3}}
context_servers: {{max_batch_size: 5}}
generation_servers:
  tensor_parallel_size: 4
  kv_cache_config: {{max_tokens: 200}}
  cp_config: {{exchange_space: latent}}
  max_seq_len: 50
"""
    )
    assert spec.context is not None
    roles = (spec.context, spec.generation)
    assert [r.max_batch_size for r in roles] == [5, 3]
    assert [r.tensor_parallel_size for r in roles] == [2, 4]
    assert [r.max_tokens for r in roles] == [100, 200]
    assert [r.kv_dtype for r in roles] == ["float16", "float16"]
    assert [r.free_gpu_memory_fraction for r in roles] == [1, 1]
    assert [r.exchange_space for r in roles] == ["value", "latent"]
    assert [r.hop_groups for r in roles] == [3, 3]


@pytest.mark.parametrize("where", ["top", "roles"])
def test_an_fp8_cache_is_inherited_or_given_by_role(where: str) -> None:
    given = "kv_cache_config: {dtype: fp8}\n"
    sections = "context_servers: {%s}\ngeneration_servers: {%s}\n"
    inner = given.strip() if where == "roles" else ""
    spec = spec_of(HEAD + (given if where == "top" else "") + sections % (inner, inner))
    assert spec.context is not None and [spec.context.kv_dtype, spec.generation.kv_dtype] == ["fp8", "fp8"]


@pytest.mark.parametrize("config", ["cp_config", "kv_cache_config"])
@pytest.mark.parametrize("where", ["top", "context_servers", "generation_servers"])
def test_one_block_size_serves_everything(config: str, where: str) -> None:
    block = random.choice([1, 4, 16, 48, 128])
    sections = {"top": "", "context_servers": "{}", "generation_servers": "{}"}
    sections[where] = f"{{{config}: {{tokens_per_block: {block}}}}}"
    top = sections.pop("top")[1:-1]
    spec = spec_of(HEAD + "\n".join([top, *(f"{name}: {value}" for name, value in sections.items())]))
    assert spec.context is not None
    assert {spec.context.tokens_per_block, spec.generation.tokens_per_block} == {block}


@pytest.mark.parametrize(
    ("line", "code", "at", "words"),
    [
        ("modle: x", "HX101", "modle", "did you mean `model`"),
        ("max_batchsize: 3", "HX101", "max_batchsize", "did you mean `max_batch_size`"),
        ("tp: 1", "HX101", "tp", "did you mean `tensor_parallel_size`"),
        ("hostname: here", "HX101", "hostname", "remove it"),
        ("gpus_per_node: 8", "HX101", "gpus_per_node", "under hardware"),
        ("tokens_per_block: 8", "HX101", "tokens_per_block", "under kv_cache_config"),
        ("qqqq: 8", "HX101", "qqqq", "known keys here"),
        ("hardware: {node: 1}", "HX101", "node", "did you mean `nodes`"),
        ("cp_config: {cp_typ: HELIX}", "HX101", "cp_typ", "did you mean `cp_type`"),
        ('max_batch_size: "2"', "HX102", '"2"', "write 2, without quotes"),
        ("max_batch_size: 2.0", "HX102", "2.0", "write 2"),
        ("max_batch_size: true", "HX102", "true", "whole number"),
        ("max_batch_size: [2]", "HX102", "[2]", "whole number"),
        ("max_batch_size:", "HX102", "", "give a value"),
        ("enable_attention_dp: yes", "HX102", "yes", "write true"),
        ("enable_attention_dp: 1", "HX102", "1", "true or false"),
        ("pp_partition: [1, '2']", "HX102", "'2'", "write 2"),
        ("pp_partition: 3", "HX102", "3", "a list"),
        ("hardware: 3", "HX102", "3", "a mapping"),
        ("parallelism: 3", "HX102", "3", "text"),
        ("context_servers:", "HX102", "", "give a value"),
        ("kv_cache_config: {free_gpu_memory_fraction: '0.5'}", "HX102", "'0.5'", "write 0.5, without quotes"),
        ("tensor_parallel_size: 0", "HX104", "0", "1 or more"),
        ("num_instances: -1", "HX104", "-1", "0 or more"),
        ("tensor_parallel_size: 1000000000000", "HX104", "1000000000000", "65536 or less"),
        ("kv_cache_config: {free_gpu_memory_fraction: 0}", "HX104", "0", "above 0"),
        ("kv_cache_config: {free_gpu_memory_fraction: 1.5}", "HX104", "1.5", "1 or less"),
        ("kv_cache_config: {free_gpu_memory_fraction: .nan}", "HX104", ".nan", "number"),
        ("dtype: bfloat", "HX105", "bfloat", "did you mean `bfloat16`"),
        ("dtype: int4", "HX105", "int4", "float16"),
        ("dtype: fp8", "HX105", "fp8", "write auto, float32, bfloat16 or float16"),
        ("dtype: bf16", "HX105", "bf16", "did you mean `bfloat16`"),
        ("kv_cache_config: {dtype: FP8}", "HX105", "FP8", "did you mean `fp8`"),
        ("kv_cache_config: {dtype: fp8_e4m3}", "HX105", "fp8_e4m3", "did you mean `fp8`"),
        ("kv_cache_config: {dtype: torch.float8_e4m3fn}", "HX105", "torch.float8_e4m3fn", "did you mean `fp8`"),
        ("kv_cache_config: {dtype: float8_e5m2}", "HX105", "float8_e5m2", "write auto, float32"),
        ("kv_cache_config: {dtype: fp4}", "HX105", "fp4", "float16 or fp8"),
        ("kv_cache_config: {dtype: half}", "HX105", "half", "did you mean `float16`"),
        ("hardware: {gpu: h20}", "HX105", "h20", "write h100, h200"),
        ("num_instances: 0", "HX104", "0", "1 or more"),
        ("hardware: {share_gpus: true}\nshare_gpus: false", "HX113", "true", "once"),
        ("cp_config: {tokens_per_block: 8}\nkv_cache_config: {tokens_per_block: 9}", "HX112", "9", "once"),
    ],
)
def test_a_mistake_is_one_finding_at_its_place(line: str, code: str, at: str, words: str) -> None:
    finding, pointed_at = only(f"{HEAD}generation_servers: {{}}\n{line}\n")
    assert (finding.code, pointed_at) == (code, at)
    assert words in str(finding.help)


@pytest.mark.parametrize(
    ("short", "code", "at", "words"),
    [
        ("ctx tp2 / gen tpp2", "HX110", "tpp2", "did you mean `tp2`"),
        ("ctx tp2 / gne tp2", "HX110", "gne", "did you mean `gen`"),
        ("ctx tp2 / generation tp2", "HX110", "generation", "did you mean `gen`"),
        ("ctx tp2 gen tp2", "HX110", "gen", "ctx tp2 / gen"),
        ("gen tp=2", "HX110", "tp=2", "did you mean `tp2`"),
        ("gen 2tp", "HX110", "2tp", "did you mean `tp2`"),
        ("gen tp 2", "HX110", "tp 2", "did you mean `tp2`"),
        ("gen tp2cp4", "HX110", "tp2cp4", "`tp2 cp4`"),
        ("gen TP2", "HX110", "TP2", "did you mean `tp2`"),
        ("gen tp2 tp4", "HX110", "tp4", "keep one"),
        ("gen dp2", "HX110", "dp2", "`tp2 dp`"),
        ("gen cp", "HX110", "cp", "`cp2`"),
        ("gen 3", "HX110", "3", "`3x`"),
        ("gen tp1 / gen tp2", "HX110", "gen", "join"),
        ("gen tp1 /", "HX110", "/", "ctx tp2 / gen"),
        ("gen tp-2", "HX110", "tp-2", "did you mean `tp2`"),
        ("gen tp0", "HX104", "tp0", "left out"),
        ("gen 0x", "HX104", "0x", "left out"),
        ("gen cp999999999999999999999", "HX104", "cp999999999999999999999", "left out"),
        ("ctx tp2", "HX103", "ctx tp2", "/ gen tp1 cp2"),
    ],
)
def test_the_caret_stands_under_the_token(short: str, code: str, at: str, words: str) -> None:
    quote = random.choice(["", '"', "'"])
    finding, pointed_at = only(f"{HEAD}parallelism:  {quote}{short}{quote}  # tp2 gen\n")
    assert (finding.code, pointed_at.strip("\"'")) == (code, at)
    assert words in str(finding.help)


def test_a_short_form_over_several_lines() -> None:
    finding, pointed_at = only(f"{HEAD}parallelism: >\n  ctx tp2 /\n  gen tp1 xy3\n")
    assert (finding.span.line, pointed_at) == (5, "xy3")


@pytest.mark.parametrize(
    "long",
    [
        "generation_servers: {context_parallel_size: 4}",
        "context_parallel_size: 4",
        "generation_servers: {enable_attention_dp: false}",
        "generation_servers: {moe_expert_parallel_size: null}",
    ],
)
def test_contradictions_show_both_places(long: str) -> None:
    finding, pointed_at = only(f"{HEAD}{long}\nparallelism: gen cp2 dp ep2\n")
    assert finding.code == "HX111"
    assert pointed_at in ("cp2", "dp", "ep2")
    assert [related.span.line for related in finding.related] == [3]


def test_everything_is_reported_at_once() -> None:
    spec, findings = findings_of(
        """modl: llama-3.1-8bb
seed: -1
dtype: half
hardware: {nodes: "1", gpus: 3}
context_servers: {kv_cache_config: {tokens_per_block: 8}, pp_partition: [0]}
generation_servers: {cp_config: {tokens_per_block: 16}, tensor_parallel_size: 2.0}
parallelism: gen tp3 cpp2
"""
    )
    assert spec is None
    expected = ["HX101", "HX101", "HX102", "HX102", "HX104", "HX104", "HX105", "HX110", "HX111", "HX112", "HX401"]
    assert sorted(finding.code for finding in findings) == expected


def test_a_misspelt_key_counts_as_what_was_meant() -> None:
    spec, findings = findings_of(f"{HEAD}generation_serverss: {{tensor_paralel_size: 2, contxt_parallel_size: 4}}\n")
    assert [finding.code for finding in findings] == ["HX101"] * 3
    assert spec is not None
    assert (spec.generation.tensor_parallel_size, spec.generation.context_parallel_size) == (2, 4)


def test_model_is_a_folder_or_a_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "checkpoints" / "tiny-llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    rest = "\nload_format: dummy\nparallelism: gen tp1\n"
    folder = str(tmp_path / "checkpoints" / "tiny-llama")
    for written in ("../checkpoints/tiny-llama", folder):
        assert spec_of(f"model: {written}{rest}", "deploy/f.yaml").model == folder
    assert spec_of(f"model: kimi-k2{rest}", "deploy/f.yaml").model == "kimi-k2"
    helps = {}
    for written in ("checkpoints/tiny-llama", "../checkpoints/tiny-lama", "DeepSeek/deepseek_v3", "zzz"):
        spec, findings = findings_of(f"model: {written}{rest}", "deploy/f.yaml")
        assert [f.code for f in findings] == ["HX401"] and has_errors(findings) and spec is not None
        assert spec.model == written
        helps[written] = str(findings[0].help)
    assert "../checkpoints/tiny-llama" in helps["../checkpoints/tiny-lama"]
    assert "`deepseek-v3`" in helps["DeepSeek/deepseek_v3"]
    assert "qwen3-8b" in helps["zzz"] and str(tmp_path / "deploy" / "zzz") in helps["zzz"]


def test_missing_keys() -> None:
    spec, findings = findings_of("seed: 3\n")
    assert spec is None
    assert [finding.code for finding in findings] == ["HX103", "HX103"]


def test_no_document_makes_the_front_end_fail() -> None:
    """Known and misspelt keys with all sorts of values, nested at random: always a Spec or an error."""
    chooser = random.Random()
    keys = [*Document.model_fields, *KvCacheConfig.model_fields, *HardwareSection.model_fields, "tp", "modl", "x"]
    scalars = [
        0,
        1,
        2,
        -1,
        2.0,
        0.5,
        "2",
        "no",
        True,
        None,
        "gen tp2 / ctx",
        "ctx tp2 gen 2x",
        "auto",
        "kimi-k2",
        [],
        [1, "2"],
    ]

    def mapping(depth: int) -> dict[str, object]:
        chosen = chooser.sample(keys, chooser.randrange(8))
        return {
            key: mapping(depth - 1) if depth and chooser.random() < 0.3 else chooser.choice(scalars) for key in chosen
        }

    for _ in range(200):
        text = yaml.safe_dump(mapping(2) | {"model": "qwen3-8b"})
        source, syntax = parse_yaml("f.yaml", text)
        if source is None:
            continue
        parsed = parse(source)
        spec, findings = parsed.spec, parsed.findings
        assert (spec is not None and parsed.sizes_known) or has_errors(findings), text
        assert not syntax
        if spec is not None:
            checks.run(source, spec, read_model("qwen3-8b"), sizes_known=parsed.sizes_known)
