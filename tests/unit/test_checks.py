"""Every check finds what it is about, points at the value responsible, and stays silent otherwise."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from helixc import checks
from helixc.diagnostics import Diagnostic
from helixc.frontend import Analysis, all_rules, analyse
from helixc.hardware import GPUS, Gpu
from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc.spec.source import LineTable
from helixc.table import byte_size

DENSE = "model: llama-3.1-8b\nload_format: dummy\n"  # 32 heads, 8 KV heads, 32 layers
MOE = "model: deepseek-v3-lite\nload_format: dummy\n"  # 16 heads, 64 experts, 27 layers


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


class Check:
    """Analyses texts as files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "f.yaml"

    def __call__(self, text: str) -> Analysis:
        self.path.write_text(text, encoding="utf-8")
        return analyse(self.path)

    def one(self, text: str) -> tuple[Diagnostic, str]:
        """The only finding and the characters it points at."""
        (finding,) = self(text).diagnostics
        return finding, LineTable.of(str(self.path), text).at(finding.span)


@pytest.mark.parametrize(
    ("text", "code", "at", "words"),
    [
        (DENSE + "parallelism: gen tp8 cp3", "HX301", "cp3", "cp among 1, 2 or 4"),
        (DENSE + "parallelism: ctx tp8 / gen tp8 cp8", "HX301", "cp8", "cp among 1, 2 or 4"),
        (MOE + "parallelism: ctx tp3 / gen cp2", "HX301", "tp3", "tp * cp among 1, 2, 4, 8 or 16"),
        (MOE + "parallelism: gen cp3 tp4 dp", "HX301", "cp3", "cp among 1, 2, 4, 8 or 16"),
        (DENSE + "parallelism: ctx cp2 / gen cp2", "HX302", "cp2", "generation_servers only"),
        (DENSE + "parallelism: gen cp2\ncp_config: {cp_type: RING}", "HX303", "RING", "HELIX"),
        (DENSE + "generation_servers: {cp_config: {cp_type: star}}", "HX303", "star", "HELIX"),
        (DENSE + "parallelism: gen cp2\ncp_config: {exchange_space: latent}", "HX308", "latent", "write value"),
        (DENSE + "parallelism: gen cp2\ncp_config: {exchange_space: value}", None, "", ""),
        (MOE + "parallelism: gen cp2\ncp_config: {exchange_space: latent}", None, "", ""),
        (DENSE + "parallelism: gen cp2\ncp_config: {hop_groups: 9}", "HX309", "9", "8 or less"),
        (DENSE + "parallelism: gen cp2\ncp_config: {hop_groups: 8}", None, "", ""),
        (DENSE + "parallelism: ctx tp2 / gen tp2\ncp_config: {hop_groups: 2}", "HX309", "2", "remove the key"),
        (DENSE + "parallelism: ctx tp2 / gen tp2\ncp_config: {hop_groups: 1}", None, "", ""),
        (DENSE.replace("8b", "405b") + "parallelism: gen tp16", "HX305", "tp16", "context_parallel_size"),
        (DENSE + "parallelism: ctx tp16 / gen", "HX305", "tp16", "tp 8 or less"),
        (MOE + "parallelism: gen tp4 cp2 ep4 moe_tp4", "HX201", "ep4", "the other follows"),
        (MOE + "parallelism: gen tp4 cp4\nmoe_tensor_parallel_size: 3", "HX201", "3", "1, 2, 4, 8 or 16"),
        (MOE.replace("deepseek-v3-lite", "kimi-k2") + "parallelism: gen tp64 ep64", None, "", ""),
        (DENSE + "parallelism: gen tp2 cp2 ep4", "HX203", "ep4", "remove"),
        (MOE + "parallelism: gen pp28", "HX204", "pp28", "27 or less"),
        (MOE + "generation_servers: {pp_partition: [26, 1]}", "HX205", "[26, 1]", "1 number, or"),
        (MOE + "parallelism: gen pp2\npp_partition: [20, 6]", "HX206", "[20, 6]", "[14, 13]"),
        (MOE + "parallelism: gen pp2\npp_partition: [20, 7]", None, "", ""),
        (DENSE.replace("load_format: dummy\n", "") + "parallelism: gen", "HX403", "llama-3.1-8b", "dummy"),
        (DENSE + "parallelism: gen\nmax_seq_len: 131073", "HX404", "131073", "131072 or less"),
        (DENSE + "parallelism: gen\nkv_cache_config: {max_tokens: 31}", "HX501", "31", "32 or more"),
        (
            DENSE + "parallelism: gen cp2\nkv_cache_config: {max_tokens: 64}\nmax_seq_len: 150",
            "HX502",
            "64",
            "86 or more",
        ),
        (DENSE + "parallelism: gen cp2\nkv_cache_config: {max_tokens: 86}\nmax_seq_len: 150", None, "", ""),
        (DENSE + "parallelism: ctx tp2 / gen cp2\nhardware: {nodes: 1, gpus_per_node: 3}", "HX601", "1", "2 nodes"),
        (DENSE + "parallelism: gen 2x cp2 pp2\nhardware: {nodes: 1, gpus_per_node: 7}", "HX601", "1", "2 nodes"),
        (DENSE + "parallelism: gen 65536x cp2", "HX602", "65536x", "65,536"),
        (DENSE + "parallelism: gen cp8\nmax_seq_len: 256", "HX306", "cp8", "of 4 or less"),
        (DENSE + "parallelism: gen cp8\nmax_seq_len: 257", None, "", ""),
        (DENSE + "parallelism: gen cp2\nmax_seq_len: 1000\nhardware: {gpu: h100}", "HX307", "cp2", "tokens on"),
        (DENSE + "parallelism: gen cp2\nmax_seq_len: 9000\nhardware: {gpu: h100}", None, "", ""),
        (DENSE + "context_servers: {max_seq_len: 9}\ngeneration_servers: {max_seq_len: 8}", "HX405", "9", "8 or less"),
        (DENSE + "context_servers: {max_seq_len: 8}\ngeneration_servers: {max_seq_len: 9}", None, "", ""),
        (
            DENSE + "dtype: bfloat16\ncontext_servers: {kv_cache_config: {dtype: float32}}\ngeneration_servers: {}",
            "HX406",
            "float32",
            "once",
        ),
        (
            DENSE + "dtype: bfloat16\ncontext_servers: {kv_cache_config: {dtype: bfloat16}}\ngeneration_servers: {}",
            None,
            "",
            "",
        ),
        (
            DENSE + "context_servers: {kv_cache_config: {dtype: fp8}}\ngeneration_servers: {}",
            "HX406",
            "fp8",
            "once",
        ),
        (DENSE + "parallelism: ctx tp1 / gen cp2\nkv_cache_config: {dtype: fp8}", None, "", ""),
        (
            DENSE + "parallelism: gen cp2\nmax_seq_len: 640\nkv_cache_config: {max_tokens: 5120}",
            "HX504",
            "5120",
            "write 2560",
        ),
        (DENSE + "parallelism: gen cp2\nmax_seq_len: 640\nkv_cache_config: {max_tokens: 2560}", None, "", ""),
        (DENSE + "parallelism: gen cp4\nhardware: {gpus_per_node: 2}", "HX603", "cp4", "of 2 or less"),
        (DENSE + "parallelism: gen cp4\nhardware: {gpus_per_node: 6}", None, "", ""),
        (DENSE + "parallelism: ctx tp1 / gen cp4\nhardware: {gpus_per_node: 4}", "HX603", "cp4", "multiple of 4"),
        (DENSE + "parallelism: ctx tp1 / gen cp4\nhardware: {gpu: gb200, gpus_per_node: 4}", None, "", ""),
    ],
)
def test_findings_of_the_checks(check: Check, text: str, code: str | None, at: str, words: str) -> None:
    if code is None:
        assert check(text).diagnostics == ()
        return
    finding, pointed_at = check.one(text)
    assert (finding.code, pointed_at) == (code, at)
    assert words in str(finding.help)


def test_kv_heads_that_neither_divide_nor_are_divided(check: Check, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 96,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 10,
        "vocab_size": 9,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    }
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    finding, pointed_at = check.one("model: tiny\nparallelism: gen tp6")
    assert (finding.code, pointed_at) == ("HX304", "tp6")
    assert "1, 2 or 4" in str(finding.help)
    codes = {d.code for d in check("model: tiny\nparallelism: gen tp4 cp3").diagnostics}
    assert codes == {"HX207", "HX208"}
    config["architectures"] = ["SomethingElse"]
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    finding, pointed_at = check.one("model: tiny\nparallelism: gen tp6")
    assert (finding.code, pointed_at) == ("HX402", "tiny")
    (tmp_path / "tiny" / "config.json").unlink()
    assert check.one("model: tiny\nparallelism: gen tp6")[0].code == "HX402"


def test_experts_that_do_not_divide(check: Check) -> None:
    findings = check(MOE.replace("deepseek-v3-lite", "deepseek-v3") + "parallelism: gen tp128 cp1 ep128").diagnostics
    assert not findings
    analysis = check(MOE + "parallelism: gen tp16 pp2 ep16\n")
    assert not analysis.diagnostics
    analysis = check("model: qwen3-235b-a22b\nload_format: dummy\nparallelism: gen tp1 cp64 ep64\n")
    assert not analysis.diagnostics  # 128 experts
    analysis = check("model: kimi-k2\nload_format: dummy\nparallelism: gen tp5 ep5\n")  # 384 experts, 64 heads
    assert {d.code for d in analysis.diagnostics} == {"HX202", "HX301"}


def test_sound_deployments_are_clean(check: Check) -> None:
    """Sizes drawn from the divisors that helix.md asks for raise nothing."""
    for _ in range(10):
        tp = random.choice([1, 2, 4, 8])
        cp = random.choice([c for c in (1, 2, 4, 8, 16, 32) if 32 % (tp * c) == 0])
        pp = random.choice([1, 2, 3, 32])
        analysis = check(f"{DENSE}parallelism: ctx tp{tp} pp{pp} / gen tp{tp} cp{cp} pp{pp}\n")
        assert analysis.ok and not analysis.diagnostics
        assert analysis.spec is not None and analysis.arch is not None


def test_sharing_counts_the_larger_side(check: Check) -> None:
    text = DENSE + "parallelism: ctx tp2 / gen cp2\nhardware: {nodes: 1, gpus_per_node: 2}\n"
    assert [d.code for d in check(text).diagnostics] == ["HX601"]
    assert not check(text + "share_gpus: true\n").diagnostics
    assert not check(text.replace("2}", "2, share_gpus: true}")).diagnostics


def test_a_value_from_the_top_level_is_where_the_finding_points(check: Check) -> None:
    text = f"{DENSE}tensor_parallel_size: 3\ngeneration_servers: {{context_parallel_size: 2}}\n"
    codes = {(d.code, d.span.line) for d in check(text).diagnostics}
    assert codes == {("HX301", 4), ("HX304", 3)}
    heads = next(d for d in check(text).diagnostics if d.code == "HX301")
    assert [related.span.line for related in heads.related] == [3]


def test_findings_of_all_stages_come_in_one_run(check: Check) -> None:
    text = f"{DENSE}seeed: 3\nseed: 4\nseed: 5\nparallelism: gen tp8 cp3\nmax_batch_size: '4'\n"
    codes = [d.code for d in check(text).diagnostics]
    assert codes == ["HX101", "HX004", "HX301", "HX102"]


def test_an_unknown_model_does_not_hide_the_rest(check: Check) -> None:
    analysis = check("model: nope\nparallelism: ctx cp2 / gen\n")
    assert [d.code for d in analysis.diagnostics] == ["HX401", "HX302"]
    assert analysis.arch is None and not analysis.ok


def test_every_code_is_explained_once() -> None:
    rules = all_rules()
    codes = [rule.code for rule in rules]
    assert len(set(codes)) == len(codes)
    for rule in rules:
        assert len(rule.explanation) > 40, rule.code
        assert not rule.title.endswith("."), rule.code


def test_every_check_is_listed() -> None:
    """A check that is written but not named in checks/__init__ would never run."""
    from helixc.checks import helix, kernels, mapping, memory, model, naming, placement
    from helixc.checks.check import Check as Defined

    families = {mapping: "HX2", naming: "HX2", helix: "HX3", model: "HX4", memory: "HX5", placement: "HX6"}
    families[kernels] = "HX7"
    defined = {m: {v.rule.code for v in vars(m).values() if isinstance(v, Defined)} for m in families}
    assert set().union(*defined.values()) == {rule.code for rule in checks.rules()}
    for module, codes in defined.items():
        assert codes and all(code.startswith(families[module]) for code in codes)


# --- The name of the file, memory, and checks in spite of errors ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ctxtp2_gentp1cp2.yaml", []),
        ("disagg_config_ctxtp2_gencp2_deepseek_v3_lite.yaml", []),
        ("ctxtp1_gentp1cp2.yaml", ["tp 1 of context_servers"]),
        ("CTX_tp2_GEN_cp4pp2.yaml", ["pp 2 of generation_servers", "cp 4 of generation_servers"]),
        ("agentp4.yaml", []),
        ("deployment.yaml", []),
    ],
)
def test_the_file_s_name(name: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(MOE + "parallelism: ctx tp2 / gen cp2\n")
    found = analyse(path).diagnostics
    assert {d.code for d in found} <= {"HX209"}
    assert [d.message.split("says ")[1].split(",")[0] for d in found] == expected


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda g: g.name)
def test_what_is_said_to_fit_fits(gpu: Gpu, check: Check) -> None:
    """The batch and the length that HX503 proposes pass, and one more of each does not."""
    text = DENSE + f"parallelism: ctx tp8 / gen tp2 cp2\nhardware: {{gpu: {gpu.name}}}\n"
    batch, length = random.choice([2048, 4096]), random.choice([50_000, 131_072])

    def codes(batch: int, length: int) -> list[str]:
        sizes = f"generation_servers: {{max_batch_size: {batch}, max_seq_len: {length}}}\n"
        return [d.code for d in check(text + sizes).diagnostics]

    finding, pointed_at = check.one(text + f"generation_servers: {{max_batch_size: {batch}, max_seq_len: {length}}}\n")
    assert (finding.code, pointed_at) == ("HX503", str(length))
    fits = re.search(r"max_batch_size (\d+) at this length, or max_seq_len (\d+) for", str(finding.help))
    assert fits
    most, longest = int(fits[1]), int(fits[2])
    assert (codes(most, length), codes(most + 1, length)) == ([], ["HX503"])
    assert (codes(batch, longest), codes(batch, longest + 1)) == ([], ["HX503"])
    for ranks in re.findall(r"context_parallel_size (\d+)", str(finding.help)):
        text = text.replace("gen tp2 cp2", f"gen tp2 cp{ranks}")
        assert "HX503" not in codes(batch, length)


def test_the_max_tokens_that_is_said_to_fit_fits(check: Check) -> None:
    text = f"{DENSE}parallelism: gen cp2\nmax_batch_size: 64\nhardware: {{gpu: h100}}\n"
    text += "kv_cache_config: {max_tokens: %s}\n"
    finding, pointed_at = check.one(text % 2_000_000)
    assert (finding.code, pointed_at) == ("HX503", "2000000")
    fits = re.search(r"max_tokens (\d+)", str(finding.help))
    assert fits and not check(text % fits[1]).diagnostics
    assert [d.code for d in check(text % (int(fits[1]) + 32)).diagnostics] == ["HX503"]


def test_a_size_that_makes_room_for_the_weights_is_proposed(check: Check) -> None:
    text = "model: deepseek-v3\nload_format: dummy\nmax_seq_len: 40000\n"
    text += "hardware: {gpu: gb200}\nparallelism: gen cp%s ep4\n"
    finding, pointed_at = check.one(text % 4)
    assert (finding.code, pointed_at) == ("HX503", "gen")
    fits = re.search(r"what would fit: context_parallel_size (\d+)", str(finding.help))
    assert fits and int(fits[1]) > 4
    assert "HX503" not in [d.code for d in check(text % fits[1]).diagnostics]


def test_the_memory_check_counts_what_the_plan_counts(check: Check) -> None:
    """On random sizes the table's total is that of the plan's largest rank."""
    for _ in range(5):
        cp, pp, tp = random.choice([1, 2, 4]), random.choice([1, 2, 5]), random.choice([1, 2])
        text = f"{MOE}parallelism: ctx tp{tp} / gen tp{tp} cp{cp} pp{pp}\nmax_batch_size: 60000\nmax_seq_len: 160000\n"
        found = check(text + "hardware: {gpu: h100}\n").diagnostics
        analysis = check(text)
        assert analysis.spec is not None and analysis.arch is not None
        plan = place(lower(analysis.spec, analysis.arch), lambda *_: ())
        (finding,) = (d for d in found if d.code == "HX503" and "generation" in d.message)
        largest = max(rank.memory.total for rank in plan.ranks if rank.role == "generation")
        assert f"needs {byte_size(largest)}," in finding.message


def test_roles_that_share_gpus_share_memory(check: Check) -> None:
    text = f"{DENSE}parallelism: ctx tp1 / gen cp2\nmax_seq_len: 32768\nmax_batch_size: 28\n"
    text += "hardware: {gpu: h100, gpus_per_node: 2}\n"
    assert [d.code for d in check(text).diagnostics] == ["HX603"]  # GPUs 1 and 2
    found = check(text + "share_gpus: true\n").diagnostics
    assert [d.code for d in found] == ["HX503"] and "share one h100" in found[0].message


def test_an_unreadable_size_does_not_hide_other_mistakes(check: Check) -> None:
    text = f"{DENSE}parallelism: ctx cp2 / gen cpp3\ncp_config: {{cp_type: RING}}\nmax_seq_len: 200000\n"
    assert [d.code for d in check(text).diagnostics] == ["HX302", "HX110", "HX303", "HX404", "HX404"]
    text = f"{DENSE}tensor_parallel_size: many\ncontext_servers: {{context_parallel_size: 2}}\ngeneration_servers: {{}}"
    assert [d.code for d in check(text).diagnostics] == ["HX102", "HX302"]


def test_a_contradiction_does_not_hide_other_mistakes(check: Check) -> None:
    text = f"{DENSE}parallelism: ctx tp3 / gen cp2\ngeneration_servers: {{context_parallel_size: 4}}\n"
    assert [d.code for d in check(text).diagnostics] == ["HX301", "HX304", "HX111"]


def test_an_unusable_dtype_of_the_checkpoint_is_a_finding(check: Check, tmp_path: Path) -> None:
    from helixc.model.builtin import CONFIGS

    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(CONFIGS["llama-3.1-8b"] | {"dtype": "float8_e4m3fn"}))
    finding, pointed_at = check.one("model: odd\nparallelism: gen\n")
    assert (finding.code, pointed_at) == ("HX402", "odd")
    assert check("model: odd\ndtype: bfloat16\nparallelism: gen\n").ok


def test_estimates_count_an_fp8_cache_s_bytes(check: Check) -> None:
    """HX307 and HX305: elements and scales, a little over half of 16 bits."""
    text = f"{DENSE}parallelism: gen cp2\nmax_seq_len: 1000\nhardware: {{gpu: h100}}\nkv_cache_config: {{dtype: %s}}\n"
    from_on = {}
    for dtype in ("bfloat16", "fp8"):
        finding, _ = check.one(text % dtype)
        (tokens,) = re.findall(r"cp pays from ([0-9,]+) tokens", str(finding.help))
        from_on[dtype] = int(tokens.replace(",", ""))
    assert from_on["fp8"] / from_on["bfloat16"] == pytest.approx(256 / 129, rel=1e-3)
    finding, _ = check.one(f"{DENSE}parallelism: gen tp16\nkv_cache_config: {{dtype: fp8}}\n")
    assert f"instead of {byte_size(32 * 8 * 2 * 129)}" in finding.message


def test_an_fp8_cache_fits_where_bfloat16_does_not(check: Check) -> None:
    text = f"{DENSE}parallelism: gen cp2\nmax_batch_size: 12\nhardware: {{gpu: h100}}\n"
    text += "max_seq_len: 131072\nkv_cache_config: {dtype: %s}\n"
    finding, _ = check.one(text % "bfloat16")
    assert finding.code == "HX503"
    assert check(text % "fp8").diagnostics == ()
    finding, _ = check.one((text % "fp8").replace("size: 12", "size: 24"))
    assert finding.code == "HX503" and any(f"x {byte_size(32 * 8 * 2 * 129)};" in line for line in finding.notes)


def test_a_head_without_a_kernel(check: Check, tmp_path: Path) -> None:
    from helixc.model.builtin import CONFIGS

    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(CONFIGS["llama-3.1-8b"] | {"head_dim": 100}))
    finding, _ = check.one("model: odd\nparallelism: gen\n")
    assert finding.code == "HX701" and "multiple of 8" in finding.message
