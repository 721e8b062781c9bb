"""TensorRT-LLM's dialect: recognised, translated, and linted for what that engine does silently or refuses late."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from helixc.cli import main
from helixc.diagnostics import Diagnostic
from helixc.frontend import Analysis, analyse_input
from helixc.inputs import Input
from helixc.spec.document import parse_yaml
from helixc.spec.file_name import claims
from helixc.spec.source import LineTable
from helixc.spec.trtllm.dialect import Dialect, Kind, is_trtllm, kind_of
from helixc.spec.trtllm.known_models import builtin_like, quantisation

SOUND = """hostname: localhost
port: 8000
model: deepseek-v3-lite
context_servers:
  num_instances: 1
  tensor_parallel_size: 2
  max_seq_len: 8192
  max_num_tokens: 8192
  cache_transceiver_config: {max_tokens_in_buffer: 8192}
  urls: ["localhost:8001"]
generation_servers:
  num_instances: 1
  tensor_parallel_size: 1
  context_parallel_size: 2
  max_batch_size: 4
  max_seq_len: 10240
  max_num_tokens: 8192
  cp_config: {cp_type: HELIX, tokens_per_block: 32}
  kv_cache_config: {tokens_per_block: 32, enable_block_reuse: false}
  cache_transceiver_config: {max_tokens_in_buffer: 8192}
  urls: ["localhost:8002"]
"""


def analysed(text: str, name: str = "f.yaml", dialect: Dialect = Dialect.AUTO) -> Analysis:
    return analyse_input(Input(name, text), dialect)


def changed(*changes: tuple[str, str]) -> str:
    text = SOUND
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def one(text: str, code: str, name: str = "f.yaml", dialect: Dialect = Dialect.TRTLLM) -> tuple[Diagnostic, str]:
    """The first finding of a code, and the characters it points at."""
    analysis = analysed(text, name, dialect)
    found = [d for d in analysis.diagnostics if d.code == code]
    assert found, analysis.diagnostics
    return found[0], LineTable.of(name, text).at(found[0].span)


@pytest.mark.parametrize("dialect", [Dialect.AUTO, Dialect.TRTLLM])
def test_a_sound_file_has_no_findings(dialect: Dialect) -> None:
    analysis = analysed(SOUND, dialect=dialect)
    assert analysis.diagnostics == ()
    assert analysis.is_whole and analysis.spec is not None and analysis.spec.generation.context_parallel_size == 2


# --- Recognising ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nparallelism: gen tp1\nhostname: x\n", None),
        ("model: m\ngeneration_servers: {tensor_parallel_size: 2}\n", None),
        ("model: m\nload_format: dummy\ngeneration_servers: {urls: []}\n", None),
        ("model: m\nhardware: {nodes: 2}\nbackend: pytorch\ngeneration_servers: {}\n", None),
        ("model: m\ngeneration_servers: {urls: []}\n", Kind.ORCHESTRATOR),
        ("model: m\nhostname: localhost\ncontext_servers: {}\n", Kind.ORCHESTRATOR),
        ("kv_cache_config: {enable_block_reuse: false}\n", Kind.WORKER),
        ("cp_config: {fifo_version: 2}\ncontext_parallel_size: 2\n", Kind.WORKER),
        ("worker_config: {gen: {}, ctx: {}}\nhardware: {gpus_per_node: 4}\n", Kind.BENCHMARK),
        ("{}", None),
    ],
)
def test_the_dialect_is_told_by_the_keys(text: str, expected: Kind | None) -> None:
    source, _ = parse_yaml("f.yaml", text)
    assert source is not None
    assert is_trtllm(source, Dialect.AUTO) == (expected is not None)
    assert is_trtllm(source, Dialect.TRTLLM) and not is_trtllm(source, Dialect.HELIXC)
    if expected is not None:
        assert kind_of(source) is expected


def test_the_flag_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(SOUND)
    assert main(["check", str(path), "--dialect", "helixc"]) == 1
    assert "unknown key `hostname`" in capsys.readouterr().out
    assert main(["check", str(path), "--dialect", "trtllm"]) == 0
    assert main(["check", str(path), "--dialect", "else"]) == 2


# --- Translating ----------------------------------------------------------------------------------------------------


def test_values_arrive_under_our_keys() -> None:
    block, tokens = random.choice([16, 32, 64]), random.randrange(4096, 10**6)
    text = f"""backend: pytorch
model: DeepSeek-V3-Lite/bf16
free_gpu_memory_fraction: 0.25
gpus_per_node: 4
moe_expert_parallel_size: 2
max_batch_size: null
context_servers: {{tensor_parallel_size: 2, enable_attention_dp: yes, moe_tensor_parallel_size: -1}}
generation_servers:
  context_parallel_size: 2
  cp_config: {{cp_type: helix, tokens_per_block: {block}}}
  kv_cache_config: {{free_gpu_memory_fraction: 0.5, dtype: FP8, max_tokens: {tokens}, enable_block_reuse: off}}
"""
    spec = analysed(text).spec
    assert spec is not None and spec.context is not None
    assert spec.model == "deepseek-v3-lite" and spec.hardware.gpus_per_node == 4
    assert (spec.context.free_gpu_memory_fraction, spec.generation.free_gpu_memory_fraction) == (0.25, 0.5)
    assert (spec.context.moe_expert_parallel_size, spec.context.moe_tensor_parallel_size) == (2, None)
    assert spec.context.enable_attention_dp and not spec.generation.enable_attention_dp
    assert spec.generation.tokens_per_block == block and spec.generation.max_tokens == tokens
    assert spec.generation.kv_dtype == "fp8"
    assert "HX905" not in {d.code for d in analysed(text).diagnostics}


@pytest.mark.parametrize(
    ("line", "at"),
    [
        ("dtype: fp8", "fp8"),
        ("dtype: float8_e4m3fn", "float8_e4m3fn"),
        ("kv_cache_config: {dtype: nvfp4}", "nvfp4"),
        ("kv_cache_config: {dtype: fp8_e5m2}", "fp8_e5m2"),
        ("kv_cache_config: {dtype: fp8}", None),
        ("kv_cache_config: {dtype: torch.float8_e4m3fn}", None),
    ],
)
def test_types_without_kernels_are_planned_in_the_model_s(line: str, at: str | None) -> None:
    text = f"port: 8000\nmodel: deepseek-v3-lite\n{line}\ncontext_servers: {{}}\ngeneration_servers: {{}}\n"
    spec = analysed(text).spec
    assert spec is not None and spec.dtype == "auto"
    assert spec.generation.kv_dtype == ("auto" if at else "fp8")
    found = [d for d in analysed(text).diagnostics if d.code == "HX905"]
    assert [f.span.column for f in found] == ([line.index(at) + 1] if at else [])


def test_a_benchmark_is_read_as_its_two_roles() -> None:
    text = """metadata: {model_dir_name: DeepSeek-R1-FP4}
hardware: {gpus_per_node: 4, num_ctx_servers: 3, num_gen_servers: 2, gpu_type: GB200}
worker_config:
  ctx: {tensor_parallel_size: 4}
  gen: {tensor_parallel_size: 2, context_parallel_size: 8, cp_config: {cp_type: HELIX}}
"""
    analysis = analysed(text)
    assert analysis.spec is not None and analysis.spec.context is not None
    assert (analysis.spec.context.num_instances, analysis.spec.generation.num_instances) == (3, 2)
    assert (analysis.spec.hardware.gpus_per_node, analysis.spec.hardware.gpu) == (4, "gb200")
    assert analysis.arch is not None and analysis.arch.num_layers == 61


def test_keys_are_noted_renamed_or_unknown() -> None:
    text = changed(
        ("port: 8000", "port: 8000\nstream_interval: 4\nmoe_backend: X\nmax_batchsize: 3\ntokens_per_block: 1")
    )
    found = {d.message: (d.code, d.help) for d in analysed(text).diagnostics}
    by_key = {message.split("`")[1]: value for message, value in found.items()}
    assert {key: value[0] for key, value in by_key.items()} == {
        "stream_interval": "HX901",
        "moe_backend": "HX906",
        "max_batchsize": "HX101",
        "tokens_per_block": "HX101",
    }
    assert "`max_batch_size`" in str(by_key["max_batchsize"][1])
    assert "kv_cache_config" in str(by_key["tokens_per_block"][1])


def test_values_of_the_wrong_type_point_into_the_file() -> None:
    finding, at = one(changed(("tensor_parallel_size: 2", 'tensor_parallel_size: "2"')), "HX102")
    assert at == '"2"' and "write 2" in str(finding.help)


@pytest.mark.parametrize(
    ("name", "known", "short"),
    [
        ("DeepSeek-V3-Lite/bf16", "deepseek-v3-lite", None),
        ("DeepSeek-V3-Lite/fp8", "deepseek-v3-lite", "fp8"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1", None),
        ("DeepSeek-R1-0528-FP4-v2", "deepseek-r1", "fp4"),
        ("DeepSeek-V3-0324-FP4", "deepseek-v3", "fp4"),
        ("DeepSeek-V3.1", "deepseek-v3", None),
        ("DeepSeek-V3.2-Exp", None, None),
        ("DeepSeek-R1-Distill-Llama-70B", None, None),
        ("Kimi-K2-Thinking-NVFP4", "kimi-k2", "nvfp4"),
        ("moonshotai/Kimi-K2.5", None, None),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b", None),
        ("llama-3.1-model/Llama-3.1-8B-Instruct", "llama-3.1-8b", None),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b", None),
        ("Qwen3-235B-A22B-FP4", "qwen3-235b-a22b", "fp4"),
        ("Qwen3/Qwen3-32B-FP8", "qwen3-32b", "fp8"),
        ("Qwen3.5-4B-FP8", None, "fp8"),
        ("gpt_oss/gpt-oss-120b", None, None),
    ],
)
def test_models_are_recognised_by_name(name: str, known: str | None, short: str | None) -> None:
    assert (builtin_like(name), quantisation(name)) == (known, short)


def test_an_unknown_model_is_no_error_but_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(changed(("deepseek-v3-lite", "gpt_oss/gpt-oss-120b")))
    assert main(["check", str(path)]) == 0
    assert "note[HX903]" in capsys.readouterr().out
    assert main(["plan", str(path)]) == 1
    assert "nothing can be built" in capsys.readouterr().err


def test_a_translated_file_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(SOUND)
    assert main(["plan", str(path)]) == 0
    assert capsys.readouterr().out.startswith("ctxtp2_gentp1cp2\n")


# --- Linting --------------------------------------------------------------------------------------------------------

CP_CONFIG = "cp_config: {cp_type: HELIX, tokens_per_block: 32}"
KV_CONFIG = "kv_cache_config: {tokens_per_block: 32, enable_block_reuse: false}"
CTX_URL, GEN_URL = 'urls: ["localhost:8001"]', 'urls: ["localhost:8002"]'


CTX_BUFFER = 'buffer: 8192}\n  urls: ["localhost:8001'
CTX_BUDGET = "max_seq_len: 8192\n  max_num_tokens: 8192"
BATCH = "  max_batch_size: 4"


@pytest.mark.parametrize(
    ("old", "new", "code", "at", "words"),
    [
        (CTX_BUDGET, "context_parallel_size: 2", "HX302", "2", "cp 1"),
        ("cp_type: HELIX", "cp_type: RING", "HX303", "RING", "HELIX"),
        ("HELIX, tokens_per_block: 32", "HELIX, tokens_per_block: 64", "HX112", "32", "once"),
        ("cp_type: HELIX, ", "", "HX911", "2", "cp_type: HELIX"),
        ("HELIX, tokens_per_block: 32", "HELIX", "HX912", "{cp_type: HELIX}", "write 32"),
        (KV_CONFIG, "kv_cache_config: {enable_block_reuse: false}", "HX912", CP_CONFIG[11:], "write 32"),
        ("enable_block_reuse: false", "enable_block_reuse: true", "HX913", "true", "false"),
        (BATCH, "  enable_chunked_prefill: on", "HX913", "on", "false"),
        (BATCH, "  max_beam_width: 4", "HX913", "4", "max_beam_width: 1"),
        ("port: 8000", "conditional_disagg_config: {a: 1}", "HX913", "conditional_disagg_config", "remove"),
        ("buffer: 8192", "buffer: 8192, enable_pipelined_transfer: true", "HX913", "true", "leave it out"),
        (", enable_block_reuse: false", "", "HX914", "{tokens_per_block: 32}", "enable_block_reuse: false"),
        ("deepseek-v3-lite", "Llama-3.1-8B", "HX915", "Llama-3.1-8B", "helixc"),
        ("size: 1\n  context", "size: 2\n  context", "HX916", "2", "release"),
        (BATCH, "  cuda_graph_config: {enable_padding: true}", "HX916", "true", "release"),
        (BATCH, "  disable_overlap_scheduler: off", "HX916", "off", "disable_overlap_scheduler: true"),
        ("parallel_size: 2\n  max_batch", "parallel_size: 64\n  max_batch", "HX916", "64", "release"),
        (CTX_URL, 'urls: ["http://a:8001/v1"]', "HX921", '"http://a:8001/v1"', "`a:8001`"),
        (CTX_URL, 'urls: ["[::1]:8001"]', "HX921", '"[::1]:8001"', "IPv4"),
        (CTX_URL, "urls: [localhost]", "HX921", "localhost", "`localhost:8001`"),
        (CTX_URL, 'urls: ["a:99999"]', "HX921", '"a:99999"', "65535"),
        (CTX_URL, "urls: localhost", "HX921", "localhost", "urls: ["),
        ("localhost:8002", "LOCALHOST:8001", "HX922", '"LOCALHOST:8001"', "of its own"),
        ("localhost:8002", "localhost:8000", "HX922", '"localhost:8000"', "of its own"),
        (GEN_URL, 'urls: ["a:1", "b:1"]', "HX923", '["a:1", "b:1"]', "num_instances to 2"),
        ("port: 8000", "max_batch_size: 3", "HX931", "4", "equal"),
        (BATCH, "  speculative_config: {decoding_type: MTP}", "HX932", "MTP", "equal"),
        ("1\n  tensor_parallel_size: 2", "0", "HX934", "0", "benchmark"),
        (CTX_BUFFER, CTX_BUFFER.replace("8192", "4096"), "HX941", "4096", "8192 or more"),
        ("max_seq_len: 10240", "max_seq_len: 4096", "HX942", "4096", "8192 or more"),
        ("max_batch_size: 4", "max_batch_size: 8193", "HX944", "8192", "8193 or more"),
        (CTX_BUDGET, CTX_BUDGET.replace("tokens: 8192", "tokens: 512"), "HX945", "512", "8192"),
        ("port: 8000", "cuda_graph_config: None", "HX952", "None", "null"),
        (BATCH, f"{BATCH}\n  cuda_graph_config: {{max_batch_size: 8}}", "HX953", "8", "use 4"),
        (BATCH, f"{BATCH}\n  cuda_graph_config: {{batch_sizes: [1, 2, 1]}}", "HX953", "1", "remove"),
        (BATCH, f"{BATCH}\n  cuda_graph_config: {{batch_sizes: [1, 6]}}", "HX953", "6", "stop at 4"),
    ],
)
def test_findings_of_the_lints(old: str, new: str, code: str, at: str, words: str) -> None:
    finding, pointed_at = one(changed((old, new)), code)
    assert pointed_at == at
    assert words in str(finding.help)


def test_cache_types_that_differ() -> None:
    text = changed(("32, enable", "32, dtype: fp8, enable"), (CTX_BUDGET, "kv_cache_config: {dtype: bfloat16}"))
    finding, at = one(text, "HX932")
    assert at == "fp8" and "bfloat16" in finding.message


def test_roles_with_different_models_and_transceivers() -> None:
    text = changed(
        ("  urls: [\"localhost:8001", "  model: Kimi-K2\n  urls: [\"localhost:8001"),
        ("  urls: [\"localhost:8002", "  model: deepseek-r1\n  urls: [\"localhost:8002"),
        ("8192}", "8192, backend: UCX}"),
    )  # fmt: skip
    finding, at = one(text, "HX932")
    assert at == "deepseek-r1" and "kimi-k2" in finding.message
    assert "HX933" not in {d.code for d in analysed(text).diagnostics}
    finding, at = one(text.replace("UCX", "NIXL", 1), "HX933")
    assert at == "UCX" and "nixl on context_servers" in finding.message


def test_what_only_their_engine_does_is_left_out_for_ours() -> None:
    text = changed(("size: 1\n  context", "size: 2\n  context"), (", enable_block_reuse: false", ""))
    assert {"HX914", "HX916"} <= {d.code for d in analysed(text, dialect=Dialect.TRTLLM).diagnostics}
    assert analysed(text).diagnostics == ()


def test_prompts_shorter_than_the_shards() -> None:
    for tokens, is_found in ((96, True), (97, False)):
        text = f"""benchmark: {{input_length: {tokens}}}
worker_config:
  gen: {{context_parallel_size: 4, cp_config: {{cp_type: HELIX, tokens_per_block: 32}}}}
"""
        found = [d.message for d in analysed(text, dialect=Dialect.TRTLLM).diagnostics if d.code == "HX916"]
        assert bool(found) == is_found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hostname: a\nmodel: deepseek-v3-lite\ncontext_servers: {context_parallel_size: 2}\n", "generation_servers"),
        ("slurm: {}\nhardware: {gpus_per_node: 4}\nserver: {tp_size: 8}\n", "worker_config"),
    ],
)
def test_nobody_to_hand_over_to(text: str, words: str) -> None:
    finding, _ = one(text, "HX103", dialect=Dialect.AUTO)
    assert finding.span.line == 1 and words in str(finding.help)


def test_one_worker_may_serve_both_roles() -> None:
    section = "{num_instances: 1, tensor_parallel_size: 2, urls: ['a:8001']}"
    both = f"model: deepseek-v3-lite\ncontext_servers: {section}\ngeneration_servers: {section}\n"
    assert "HX922" not in {d.code for d in analysed(both).diagnostics}
    assert one(both.replace("size: 2", "size: 1", 1), "HX922")


def test_benchmark_lengths() -> None:
    text = """metadata: {model_dir_name: DeepSeek-R1, benchmark_type: 8k1k}
benchmark: {input_length: 1024, output_length: 1024}
hardware: {gpus_per_node: 4, num_ctx_servers: 1, num_gen_servers: 1}
worker_config:
  ctx: {max_seq_len: 1000}
  gen: {max_seq_len: 2048, cache_transceiver_config: {max_tokens_in_buffer: 512}}
"""
    assert one(text, "HX943")[1] == "1000"
    assert one(text, "HX941")[1] == "512"
    assert one(text, "HX951")[1] == "1024"
    assert not [d for d in analysed(text).diagnostics if d.code == "HX943" and "gen" in d.message]


def test_what_a_name_claims_is_compared() -> None:
    name = "x-fp4_1k1k_ctx2_tp4_gen1_dep16_bs8_eplb0_mtp1_ccb-UCX.yaml"
    text = """hardware: {gpus_per_node: 4, num_ctx_servers: 2, num_gen_servers: 3}
benchmark: {input_length: 1024, output_length: 1024}
worker_config:
  ctx: {tensor_parallel_size: 4}
  gen: {tensor_parallel_size: 8, enable_attention_dp: true, max_batch_size: 8}
"""
    found = [
        (d.code, d.message) for d in analysed(text, name, Dialect.TRTLLM).diagnostics if d.code in ("HX209", "HX951")
    ]
    assert [code for code, _ in found].count("HX209") == 1
    assert {message.split("`")[1] for code, message in found if code == "HX951"} == {"gen1", "mtp1"}


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("a_ctxtp2ep2pp2_gentp4_b", {"context": "tp2 ep2 pp2", "generation": "tp4"}),
        ("ctxtp1_gentp1_x_ctxpp2_gentp2", {"context": "tp1 pp2", "generation": "tp2"}),
        ("disagg_config_overlap_gen_first_pp4", {}),
        ("context_gentle_tp2", {}),
        ("disagg_config_gen_only_trt", {}),
    ],
)
def test_names(stem: str, expected: dict[str, str]) -> None:
    short = {"tensor": "tp", "context": "cp", "pipeline": "pp", "moe_expert": "ep"}
    found: dict[str, set[str]] = {}
    for claim in claims(stem):
        found.setdefault(str(claim.role), set()).add(f"{short[claim.key.split('_parallel')[0]]}{claim.value}")
    assert found == {role: set(sizes.split()) for role, sizes in expected.items()}
