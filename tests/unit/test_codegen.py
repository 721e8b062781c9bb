"""Which kernels are chosen, and how their text is made. No NVRTC."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helixc.codegen.build import render_all
from helixc.codegen.config import configure
from helixc.codegen.problem import attention, exchange, ffn, problems
from helixc.codegen.render import Renderer, RenderError
from helixc.codegen.select import names_for, select
from helixc.codegen.template_root import template_root
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.manifest import (
    SCHEMA,
    WITHOUT_HOP,
    Groups,
    Instance,
    Memory,
    Model,
    ModelArch,
    Plan,
    Rank,
    Role,
    Rope,
)
from tests.deployments import plan_of, role
from tests.gpu.ffn_cases import QWEN3, V3, V3_LITE
from tests.gpu.ffn_cases import ffn as mixture_of
from tests.gpu.kernel_cases import gqa, mla

_LITE = ("router_e64_d2048", "gate_up_d2048_i1408_e64of64k6_i704_n8", "down_d2048_i1408_e64of64k6_i704_n8")


def test_names_say_what_a_kernel_is_specialised_on() -> None:
    append, combine = "append_mla_h64_d576_r64_b32_bf16", "combine_cp2_p512_bf16"
    names = {arch: [spec.name for spec in problems(mla(64, 32), 2, arch)] for arch in ("sm_90a", "sm_100a")}
    assert names["sm_90a"] == [append, "mla_schedule", "mla_partial_h64_b32", "mla_merge_h64", combine]
    assert names["sm_100a"] == [append, "partial_mla_h64_d576_b32_bf16", "merge_p512_bf16", combine]
    assert problems(gqa(8, 1, 128, 32), 1, "sm_90a")[-1].name == "combine_cp1_p128_bf16"
    assert problems(gqa(8, 1, 128, 32, "float16"), 1, "")[1].name == "partial_gqa_h8_kv1_d128_b32_f16"
    fp8 = mla(64, 32, kv_dtype="float8_e4m3fn", query_tokens=4)
    assert attention(fp8, "sm_100a")[0].name == "partial_mla_h64_d576_b32_bf16_kvf8_q4"


@pytest.mark.parametrize(
    ("shape", "hopper"),
    [
        (mla(16, 32), True),
        (mla(128, 64), True),
        (mla(24, 32), True),
        (mla(12, 32), False),  # heads are fetched by eights
        (mla(64, 16), False),  # pages shorter than a copy's box
        (mla(64, 32, "float16"), False),
        (gqa(64, 8, 128, 64), True),
        (gqa(16, 1, 64, 16), True),
        (gqa(17, 1, 128, 64), False),  # no share of its heads but one head
        (gqa(8, 1, 96, 64), False),
        (gqa(8, 1, 128, 4), False),
        (gqa(8, 1, 128, 96), False),
        (mla(64, 32, query_tokens=2), True),
        (mla(128, 64, query_tokens=4), True),
        (mla(64, 32, query_tokens=5), False),
        (gqa(8, 1, 128, 64, query_tokens=2), True),
        (gqa(8, 1, 128, 64, query_tokens=3), True),  # 24 queries a KV head, in two shares
        (gqa(32, 1, 128, 64, query_tokens=5), False),  # and 160
        (mla(64, 32, kv_dtype="float8_e4m3fn"), True),
        (mla(16, 64, kv_dtype="float8_e4m3fn", query_tokens=3), True),
        (mla(64, 32, "float16", kv_dtype="float8_e4m3fn"), False),
        (gqa(8, 1, 128, 64, kv_dtype="float8_e4m3fn"), True),
        (gqa(4, 1, 64, 16, kv_dtype="float8_e4m3fn", query_tokens=4), True),
        (gqa(8, 1, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=3), True),
        (gqa(8, 1, 128, 192, kv_dtype="float8_e4m3fn"), False),  # no tile of 128 tokens is filled by it
        (gqa(8, 1, 128, 64, "float16", kv_dtype="float8_e4m3fn"), False),
    ],
)
def test_hopper_kernels_where_they_serve_the_shape(shape: AttentionShape, hopper: bool) -> None:
    for arch, expected in (("sm_90a", hopper), ("sm_100a", False)):
        templates = {spec.template for spec in attention(shape, arch)}
        assert ("partial" not in templates) == expected, (arch, templates)


@pytest.mark.parametrize(
    ("heads", "tokens", "share_heads", "share_tokens", "shares", "cluster"),
    [
        (8, 1, 8, 1, 1, 1),
        (16, 1, 16, 1, 1, 1),
        (8, 3, 8, 2, 2, 2),
        (8, 4, 8, 2, 2, 2),
        (32, 1, 16, 1, 2, 2),
        (16, 3, 16, 1, 3, 1),
        (21, 4, 7, 2, 6, 2),
    ],
)
def test_the_queries_of_a_kv_head_are_shared_among_thread_blocks(
    heads: int, tokens: int, share_heads: int, share_tokens: int, shares: int, cluster: int
) -> None:
    params = configure(attention(gqa(heads, 1, 128, 64, query_tokens=tokens), "sm_90a")[1]).params
    got = tuple(params[name] for name in ("share_heads", "share_tokens", "shares", "cluster"))
    assert got == (share_heads, share_tokens, shares, cluster)


@pytest.mark.parametrize(
    ("heads", "tokens", "row_tokens", "cluster_tokens", "cluster", "width"),
    [
        (16, 1, 1, 1, 1, 16),
        (16, 2, 2, 2, 1, 32),
        (16, 3, 3, 3, 1, 64),
        (24, 2, 2, 1, 1, 32),
        (32, 1, 1, 1, 1, 32),
        (32, 3, 3, 3, 2, 64),
        (32, 4, 4, 4, 2, 64),
        (64, 2, 2, 2, 2, 64),
        (64, 3, 3, 1, 1, 64),  # 192 queries are too many for a cluster
        (64, 4, 4, 2, 2, 64),
        (128, 3, 3, 1, 2, 64),
        (128, 4, 2, 1, 2, 64),
    ],
)
def test_query_tokens_share_tiles_as_far_as_a_cluster_has_room(
    heads: int, tokens: int, row_tokens: int, cluster_tokens: int, cluster: int, width: int
) -> None:
    shape = mla(heads, 64, kv_dtype="float8_e4m3fn", query_tokens=tokens)
    schedule, partial, merge = attention(shape, "sm_90a")
    assert {dict(spec.params)["row_tokens"] for spec in (schedule, partial, merge)} == {row_tokens}
    assert dict(partial.params)["cluster_tokens"] == cluster_tokens
    choice = configure(partial)
    assert (choice.cluster, choice.width) == (cluster, width)
    assert choice.dynamic_shared is not None and choice.dynamic_shared <= 232_448


@pytest.mark.parametrize("group", [*range(1, 18), 128])
def test_head_tiles_cover_the_group(group: int) -> None:
    tile = configure(problems(gqa(group, 1, 64, 32), 1, "sm_100a")[1]).head_tile
    assert tile is not None and 1 <= tile <= 8
    assert -(-group // tile) == -(-group // 8)  # as few tiles as with full ones


@pytest.mark.parametrize(
    ("shape", "lanes", "columns"),
    [
        (mla(128, 64), 32, 8),
        (mla(128, 64, "float32"), 32, 4),
        (gqa(64, 8, 128, 64), 8, 8),  # a lane has both halves of its pairs
        (gqa(64, 8, 128, 64, "float32"), 16, 4),
        (gqa(1, 1, 256, 64), 16, 8),
        (gqa(9, 3, 72, 64), 16, 4),  # 36 columns a half
        (gqa(9, 3, 8, 64), 1, 4),
        (replace(gqa(9, 3, 64, 64), interleaved=True), 8, 8),
        (replace(gqa(9, 3, 72, 64), rope_dim=2), 32, 1),
    ],
)
def test_an_append_s_loads_fit_its_columns(shape: AttentionShape, lanes: int, columns: int) -> None:
    config = configure(problems(shape, 1, "sm_90a")[0])
    assert (config.lanes, config.columns) == (lanes, columns)


def test_norms_are_part_of_an_append() -> None:
    shape = replace(gqa(8, 1, 128, 32), qk_norm=True, norm_eps=1e-5)
    params = configure(problems(shape, 1, "sm_90a")[0]).params
    assert (params["qk_norm"], params["norm_eps"]) == (True, 1e-5)
    with pytest.raises(ValueError, match="MLA has no q/k norms"):
        replace(mla(8, 32), qk_norm=True)


def _arch(heads: int, kv_heads: int) -> ModelArch:
    rope = Rope(theta=10_000.0, interleaved=False)
    return ModelArch(
        "LlamaForCausalLM",
        512,
        4,
        heads,
        kv_heads,
        64,
        1024,
        1000,
        2048,
        1e-5,
        rope,
        None,
        None,
        False,
        False,
        True,
        (0,),
    )


def _rank(number: int, role: Role, q_heads: int, kv_heads: int) -> Rank:
    alone = Groups(*[(number,)] * 6)
    memory = Memory(0, 0, 0, 0, 0)
    coordinates = (0,) * 10
    return Rank(
        number,
        role,
        *coordinates,
        alone,
        (0, 4),
        (8, 8 + q_heads),
        (2, 2 + kv_heads),
        (0, 1),
        "value",
        None,
        0,
        memory,
        (),
    )


def test_a_plan_needs_one_set_of_kernels_a_shape() -> None:
    model = Model("m", None, "dummy", 0, "bfloat16", "bfloat16", _arch(32, 8))
    context = Instance("context", 0, (0,), 1, 1, 1, 1, 1, False, 4, 128, 0.9, "collective", 0, WITHOUT_HOP, "peer")
    generation = Instance(
        "generation", 0, (1, 2), 2, 2, 1, 4, 1, False, 4, 128, 0.9, "one_sided", 3, WITHOUT_HOP, "host"
    )
    ranks = (_rank(0, "context", 32, 8), _rank(1, "generation", 16, 4), _rank(2, "generation", 16, 4))
    plan = Plan(SCHEMA, "p", model, 32, (context, generation), ranks, (), (), ranks[0], ())
    specs = select(plan, ("sm_90a", "sm_100a"))
    hopper, other = (names_for((arch,), model, ranks[1], generation, 32) for arch in ("sm_90a", "sm_100a"))
    append, combine = "append_gqa_h16_kv4_d64_r64_b32_bf16", "combine_cp2_p64_bf16"
    sends = (
        "batch_r64_b32",
        "embed_d512_bf16",
        "exchange_cp2_h8_p64_bf16",
        "reduce_n1_d512_bf16",
        "reduce_n4_d512_bf16",
        "argmax_n4_bf16",
    )
    of_ffn = (*(f"linear_w{team}_n8" for team in (1, 2, 4, 8)), "gate_up_d512_i1024_n8", "down_d512_i1024_n8")
    rest = (combine, *sends, *of_ffn)
    assert hopper == (append, "gqa_schedule_h16_kv4_d64_b32", "gqa_partial_h16_kv4_d64_b32", *rest)
    assert other == (append, "partial_gqa_h16_kv4_d64_b32_bf16", "merge_p64_bf16", *rest)
    both = names_for(("sm_90a", "sm_100a"), model, ranks[1], generation, 32)
    assert both == (*hopper, *other[1:3])
    apart = replace(generation, exchange="collective", reduce_rows=0)
    assert names_for(("sm_90a",), model, ranks[1], apart, 32) == (*hopper[:4], sends[0], sends[1], sends[3], *of_ffn)
    by_peers = ("handoff_d64_b32_bf16",)
    assert [s.name for s in specs] == [*hopper, *by_peers, *other, *by_peers]
    assert names_for(("sm_90a", "sm_100a"), model, ranks[0], context, 32) == by_peers
    assert names_for(("sm_90a",), model, ranks[0], replace(context, handoff="host"), 32) == ()
    planned = configure(specs[2]).planned()
    assert planned.params["scale"] == 0.125 and planned.cubin is None


def test_the_exchange_merges_the_splits_that_attention_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Hopper's MLA, and no others."""

    def exchanges(model: str, arch: str, **sizes: int) -> list[str]:
        plan = plan_of(model, None, role(cp=2, block=32, **sizes), dtype="bfloat16")
        return [spec.name for spec in select(plan, (arch,)) if "exchange" in spec.template]

    assert exchanges("deepseek-v3-lite", "sm_90a") == ["merge_exchange_cp2_h8_p512_bf16"]
    assert exchanges("deepseek-v3", "sm_90a", tp=2) == ["merge_exchange_cp2_h32_p512_bf16"]
    assert exchanges("deepseek-v3", "sm_100a", tp=2) == ["exchange_cp2_h32_p512_bf16"]
    assert exchanges("llama-3.1-70b", "sm_90a") == ["exchange_cp2_h32_p128_bf16"]
    monkeypatch.setenv("HELIXC_PORTABLE", "1")
    assert exchanges("deepseek-v3-lite", "sm_90a") == ["exchange_cp2_h8_p512_bf16"]


@pytest.mark.parametrize(
    ("shape", "max_rows", "names"),
    [
        (mixture_of(V3_LITE, 2048, 704, 1408, 5472), 8, {"gate_up_d2048_i5472_n8", "down_d2048_i5472_n8", *_LITE}),
        (mixture_of(QWEN3, 4096, 768), 9, {"gate_up_d4096_e128of128k8_i768_n16", "down_d4096_e128of128k8_i768_n8"}),
        (mixture_of(V3, 7168, 2048, 256, experts=(32, 64)), 1, {"gate_up_d7168_i256_e32of256k8_i2048_n8"}),
    ],
    ids=["dense and mixture", "none shared", "a rank's experts"],
)
def test_ffn_kernels(shape: FfnShape, max_rows: int, names: set[str]) -> None:
    specs = ffn(shape, max_rows, "sm_90a")
    found = [spec.name for spec in specs]
    assert names <= set(found) and len(set(found)) == len(found)
    assert {dict(spec.params).get("eights", 1) for spec in specs} == ({1, 2} if max_rows > 8 else {1})


@pytest.mark.parametrize(
    "shape",
    [
        replace(mixture_of(V3_LITE, 2048, 704, 1408), dtype="float32"),
        mixture_of(V3_LITE, 2052, 704, 1408),
        mixture_of(V3_LITE, 2048, 704, 1404),
        mixture_of(replace(V3, experts=512), 2048, 256),
    ],
    ids=["dtype", "hidden", "shared columns", "too many experts"],
)
def test_what_torch_computes_needs_no_ffn_kernels(shape: FfnShape) -> None:
    assert ffn(shape, 8, "sm_90a") == ()


def test_names_are_unique() -> None:
    shapes = [
        shape
        for kv_dtype in ("bfloat16", "float8_e4m3fn")
        for tokens in (1, 2, 3, 4)
        for shape in (
            mla(16, 32, kv_dtype=kv_dtype, query_tokens=tokens),
            gqa(8, 1, 128, 32, kv_dtype=kv_dtype, query_tokens=tokens),
        )
    ]
    specs = {spec for shape in shapes for spec in attention(shape, "sm_100a")}
    assert len({spec.name for spec in specs}) == len(specs) == len(shapes) + 2  # and a merge of each width
    hopper = {spec for shape in shapes for spec in attention(shape, "sm_90a")}
    assert len({spec.name for spec in hopper}) == len(hopper)


def test_dims_no_kernel_serves() -> None:
    for spec in problems(gqa(2, 1, 12, 32), 1, "sm_100a")[:2]:
        with pytest.raises(ValueError, match=f"{spec.name}: head_dim 12 is not a multiple of 8"):
            configure(spec)
    with pytest.raises(ValueError, match="rope_dim 0 leaves nothing to rotate"):
        configure(problems(replace(gqa(2, 1, 64, 32), rope_dim=0), 1, "sm_90a")[0])
    with pytest.raises(ValueError, match="does not fit 49152 bytes of shared memory"):
        configure(problems(gqa(2, 1, 8192, 32), 1, "sm_90a")[1])
    with pytest.raises(ValueError, match="exchange_cp2_h8_p20_bf16: 20 columns of 40 bytes are not a multiple of 16"):
        configure(exchange(replace(mla(16, 32), value_dim=20), 2, "sm_90a"))


def test_a_template_line_is_the_line_of_the_message() -> None:
    """The text after #line 1 is the template line by line: no template holds a statement."""
    for source in render_all((*problems(mla(16, 4), 2, "sm_90a"), *attention(mla(128, 32), "sm_90a"))):
        template = template_root() / "kernels" / f"{source.config.spec.template}.cu.j2"
        assert "{%" not in template.read_text()
        marker = f'#line 1 "kernels/{template.name}"\n'
        assert source.text.partition(marker)[2].count("\n") == template.read_text().count("\n")


def _broken(tmp_path: Path, right: str, wrong: str) -> Renderer:
    root = tmp_path / "templates"
    shutil.copytree(template_root(), root)
    path = root / "kernels" / "partial.cu.j2"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    return Renderer(root)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("{{ blok }}", "'blok' is undefined"), ("{{ block }", "unexpected '}'")],
)
def test_a_broken_template_names_its_line(tmp_path: Path, wrong: str, message: str) -> None:
    lines = (template_root() / "kernels" / "partial.cu.j2").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "{{ block }}" in text)
    renderer = _broken(tmp_path, "{{ block }}", wrong)
    with pytest.raises(RenderError, match=f"^kernels/partial.cu.j2:{line}: {message}"):
        renderer.render(configure(problems(mla(16, 4), 2, "sm_90a")[1]))


def test_the_include_digest_follows_the_headers(tmp_path: Path) -> None:
    spec = problems(mla(16, 4), 2, "sm_90a")[1]
    before = Renderer(template_root()).render(configure(spec)).include_digest
    root = tmp_path / "templates"
    shutil.copytree(template_root(), root)
    header = root / "include" / "helix" / "warp.cuh"
    header.write_text(header.read_text() + "// changed\n")
    assert Renderer(root).render(configure(spec)).include_digest != before


def test_only_a_low_rank_query_has_a_norm_of_its_own() -> None:
    for model, names in (("deepseek-v3", {"norm_d1536_bf16"}), ("deepseek-v3-lite", set()), ("qwen3-8b", set())):
        plan = plan_of(model, None, role(cp=2), dtype="bfloat16")
        found = names_for(("sm_90a",), plan.model, plan.ranks[0], plan.instances[0], 32)
        assert {name for name in found if name.startswith("norm")} == names
