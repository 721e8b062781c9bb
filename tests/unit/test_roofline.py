"""Rooflines of kernels against figures worked out by hand."""

from __future__ import annotations

import pytest

from helixc.build import make_plan
from helixc.codegen.roofline import roofline
from helixc.model import read_model
from helixc_runtime.manifest import Kernel, Plan
from tests.deployments import role, spec


def plan_of(model: str, **generation: int | str) -> Plan:
    deployed = spec(model, None, role(**{"batch": 1, "block": 64} | generation), load_format="dummy", dtype="bfloat16")
    return make_plan(deployed, read_model(model), ("sm_90a",))


def kernel(plan: Plan, template: str) -> Kernel:
    return next(kernel for kernel in plan.kernels if kernel.template == template)


def test_mla_at_one_row_of_64k_tokens() -> None:
    """64k tokens of 1,152 bytes at 3.35 TB/s; 2 * 64k * 1,088 operations a head at 990 TFLOP/s."""
    few, many = (plan_of(model, max_seq_len=65536) for model in ("deepseek-v3-lite", "deepseek-v3"))
    found = roofline(few, kernel(few, "mla_partial"), None)
    assert found is not None and (found.gpu, found.bound) == ("h100", "memory")
    assert found.bytes == 65536 * 1152 and found.operations == 2 * 65536 * 1088 * 16
    assert found.seconds * 1e6 == pytest.approx(22.5, abs=0.1)
    found = roofline(many, kernel(many, "mla_partial"), "h200")
    assert found is not None and (found.gpu, found.bound) == ("h200", "arithmetic")
    assert found.seconds * 1e6 == pytest.approx(18.4, abs=0.1)


def test_cp_divides_what_a_rank_reads() -> None:
    alone, split = (plan_of("llama-3.1-8b", max_seq_len=131072, cp=cp) for cp in (1, 4))
    whole, quarter = (roofline(plan, kernel(plan, "gqa_partial"), None) for plan in (alone, split))
    assert whole is not None and quarter is not None
    assert whole.bytes == 4 * quarter.bytes == 131072 * 8 * 2 * 128 * 2


def test_the_exchange_s_combine_and_the_append() -> None:
    plan = plan_of("deepseek-v3-lite", max_seq_len=65536, cp=2)
    combine, append = (roofline(plan, kernel(plan, template), None) for template in ("combine", "append"))
    assert combine is not None and combine.bytes == 3 * 8 * (512 * 2 + 4)
    assert append is not None and append.bytes == 2 * 16 * 576 * 2 + 2 * 576 * 2


def test_an_fp8_cache_is_read_with_its_scales() -> None:
    plan = plan_of("llama-3.1-8b", max_seq_len=131072, cp=4, kv_dtype="fp8")
    partial, append = (next(k for k in plan.kernels if k.template.endswith(name)) for name in ("partial", "append"))
    read, written = roofline(plan, partial, None), roofline(plan, append, None)
    assert read is not None and read.bytes == 131072 // 4 * 8 * 2 * (128 + 1)
    queries, computed = 2 * 32 * 128 * 2, 8 * 2 * 128 * 2  # bytes: queries in and out, k and v in
    assert written is not None and written.bytes == queries + computed + 8 * 2 * (128 + 1)


def test_an_ffn_reads_the_experts_that_its_rows_draw() -> None:
    """One row draws 6 of 64 experts, eight draw 1 - (58 / 64)^8 of them; each has 3 matrices of 2048 by 1408."""
    one, eight = (plan_of("deepseek-v3-lite", max_seq_len=4096, batch=batch) for batch in (1, 8))
    router, *first = (roofline(one, _mixture(one, name), None) for name in ("router", "gate_up", "down"))
    assert router is not None and router.bytes == 64 * 2048 * 2
    assert [found.bytes for found in first if found] == [n * 2048 * (2816 + 6 * 1408) * 2 for n in (2, 1)]
    more = roofline(eight, _mixture(eight, "down"), None)
    assert more is not None and more.bytes == 2048 * (2816 + 35 * 1408) * 2
    assert more.operations == 2 * 8 * 2048 * (2816 + 6 * 1408)


def _mixture(plan: Plan, template: str) -> Kernel:
    return next(k for k in plan.kernels if k.template == template and k.params["experts"])


def test_a_schedule_has_no_roofline() -> None:
    plan = plan_of("deepseek-v3-lite", max_seq_len=65536)
    assert roofline(plan, kernel(plan, "mla_schedule"), None) is None


def test_what_is_sent_takes_the_link_s_time() -> None:
    plan = plan_of("deepseek-v3", max_seq_len=65536, cp=4)
    sums = [k for k in plan.kernels if k.template == "reduce" and k.params["hidden"] == 7168]
    exchange, (alone, all_four) = (
        roofline(plan, kernel(plan, "exchange"), "h200"),
        (roofline(plan, k, "h200") for k in sums),
    )
    assert exchange is not None and (exchange.bytes, exchange.bound) == (3 * 32 * (512 * 2 + 4), "NVLink")
    assert exchange.seconds == exchange.bytes / 450e9
    values = plan_of("deepseek-v3", max_seq_len=65536, cp=4, exchange_space="value")
    exchange, combine = (roofline(values, kernel(values, name), None) for name in ("exchange", "combine"))
    assert exchange is not None and exchange.bytes == 3 * 32 * (128 * 2 + 4)
    assert combine is not None and combine.bytes == 5 * 32 * (128 * 2 + 4)
    assert alone is not None and (alone.bytes, alone.bound) == (4 * 7168 * 2, "memory")
    assert all_four is not None and (all_four.bytes, all_four.bound) == (3 * 7168 * 2, "NVLink")
