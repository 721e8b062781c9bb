"""Mapping, ownership, shards and transfers of random plans against the brute-force model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from helixc.plan.mapping import Mapping, stages
from helixc.plan.verify import find_flaws
from helixc_runtime.manifest import (
    Groups,
    Instance,
    Range,
    Rank,
    Role,
    global_position,
    local_length,
    local_slot,
    owner,
)
from tests.model import brute_force as truth
from tests.model.strategies import Case, Sizes, cases, grids, partitions

quick = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
few = settings(quick, max_examples=20)


def numbers(found: Range) -> list[int]:
    return list(range(*found))


# --- Mapping ----------------------------------------------------------------------------------------------------


@few
@given(grids(4096), st.integers(0, 1000), st.data())
def test_coordinates_and_groups(sizes: Sizes, first: int, data: st.DataObject) -> None:
    """Any of tp, cp, pp and ep up to 64, instances of up to 4096 ranks."""
    mapping = Mapping(sizes.tp, sizes.cp, sizes.pp, sizes.ep)
    seats = truth.seats(sizes.tp, sizes.cp, sizes.pp, sizes.ep)
    event(f"ranks: 2^{len(seats).bit_length()}")
    assert mapping.world == len(seats)
    for seat in data.draw(st.lists(st.sampled_from(seats), min_size=1, max_size=8)):
        at = mapping.coordinates(seat.rank)
        assert (at.pp, at.tp, at.cp) == (seat.pp, seat.tp, seat.cp)
        assert (at.ffn_tp, at.moe_tp, at.moe_ep) == (seat.ffn, seat.moe_tp, seat.moe_ep)
        groups = mapping.groups(seat.rank, first)
        for name, ranks in truth.groups(seats, seat).items():
            assert list(getattr(groups, name)) == [first + rank for rank in ranks], name


@quick
@given(st.integers(1, 64), st.integers(0, 200), st.data())
def test_stages(pp: int, more: int, data: st.DataObject) -> None:
    layers = pp + more
    partition = data.draw(partitions(layers, pp))
    expected = truth.stage_layers(layers, pp, list(partition) if partition else None)
    assert [numbers(stage) for stage in stages(layers, pp, partition)] == expected


# --- Ownership --------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 10**7), st.integers(1, 129), st.integers(1, 64))
def test_shard_lengths(length: int, block: int, cp: int) -> None:
    assert [local_length(length, block, cp, rank) for rank in range(cp)] == truth.owned(length, block, cp)


@few
@given(st.integers(1, 10**7), st.integers(1, 129), st.integers(1, 64), st.data())
def test_owner_and_slot(length: int, block: int, cp: int, data: st.DataObject) -> None:
    tape = truth.tape(length, block, cp)
    for position in data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5)):
        rank = int(tape[position])
        slot = int((tape[:position] == rank).sum())
        assert owner(position, block, cp) == rank
        assert local_slot(position, block, cp) == slot
        assert global_position(slot, block, cp, rank) == position


@quick
@given(st.integers(0, 600), st.integers(1, 9), st.integers(1, 64))
def test_every_slot_is_filled_once_and_in_order(length: int, block: int, cp: int) -> None:
    slots = truth.local_slots(length, block, cp)
    assert [(owner(p, block, cp), local_slot(p, block, cp)) for p in range(length)] == slots


def test_seed_example() -> None:
    """The specification's own: 7 tokens, 2 ranks, blocks of 4; q7 goes to rank 1."""
    assert truth.tape(8, 4, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert truth.owned(7, 4, 2) == [4, 3]
    assert truth.owned(8, 4, 2) == [4, 4]


# --- Plans ------------------------------------------------------------------------------------------------------


@quick
@given(cases())
def test_ranks_of_a_plan(case: Case) -> None:
    """Numbers, places, groups, layers and heads of all ranks of all instances."""
    worlds = [len(i.ranks) for i in case.plan.instances]
    event(f"ranks: 2^{sum(worlds).bit_length()}")
    assert [i.role for i in case.plan.instances] == sorted(i.role for i in case.plan.instances)
    grouped: dict[Sizes, list[dict[str, list[int]]]] = {}  # slow to find by looking at everybody
    for instance, first in zip(case.plan.instances, truth.first_ranks(worlds), strict=True):
        sizes = case.sizes(instance.role)
        seats = truth.seats(sizes.tp, sizes.cp, sizes.pp, sizes.ep)
        if sizes not in grouped:
            grouped[sizes] = [truth.groups(seats, seat) for seat in seats]
        layers = truth.stage_layers(case.arch.num_layers, sizes.pp, list(sizes.partition or ()))
        assert list(instance.ranks) == list(range(first, first + len(seats)))
        for rank, seat in zip(case.ranks(instance), seats, strict=True):
            assert (rank.rank, rank.local_rank) == (first + seat.rank, seat.rank)
            assert (rank.pp_rank, rank.tp_rank, rank.cp_rank) == (seat.pp, seat.tp, seat.cp)
            assert (rank.ffn_tp_rank, rank.moe_tp_rank, rank.moe_ep_rank) == (seat.ffn, seat.moe_tp, seat.moe_ep)
            expected = grouped[sizes][seat.rank]
            assert {f.name for f in fields(Groups)} == set(expected)
            for name, ranks in expected.items():
                assert list(getattr(rank.groups, name)) == [first + member for member in ranks]
            assert numbers(rank.layers) == layers[seat.pp]
            check_heads(case, rank, seat, sizes)


def heads_tp(sizes: Sizes) -> int:
    """How many ways heads are split: under attention dp each tp rank has whole heads."""
    return 1 if sizes.dp else sizes.tp


def placed(seat: truth.Seat, sizes: Sizes) -> truth.Seat:
    """The seat as attention sees it."""
    return truth.Seat(**{**vars(seat), "tp": 0}) if sizes.dp else seat


def check_heads(case: Case, rank: Rank, seat: truth.Seat, sizes: Sizes) -> None:
    heads, kv_heads, tp = case.arch.num_heads, case.arch.num_kv_heads, heads_tp(sizes)
    queries = truth.query_heads(placed(seat, sizes), heads, tp)
    assert numbers(rank.q_heads) == queries
    assert numbers(rank.out_heads) == truth.kept_heads(placed(seat, sizes), heads, tp, sizes.cp)
    assert numbers(rank.kv_heads) == sorted({truth.kv_head_of(head, heads, kv_heads) for head in queries})


@quick
@given(cases(most=48))
def test_shards(case: Case) -> None:
    """Which rows of which weight every rank loads."""
    for instance in case.plan.instances:
        sizes = case.sizes(instance.role)
        seats = truth.seats(sizes.tp, sizes.cp, sizes.pp, sizes.ep)
        for rank, seat in zip(case.ranks(instance), seats, strict=True):
            expected = rows(case, seat, sizes)
            for piece in case.plan.shards[rank.shard]:
                sliced = expected.get(piece.name, {})
                for dim, size in enumerate(piece.shape):
                    assert numbers(piece.box[dim]) == sliced.get(dim, list(range(size))), (piece.name, dim)
                if piece.experts is not None:
                    assert case.arch.moe
                    assert numbers(piece.experts) == truth.cut(case.arch.moe.experts, sizes.ep, seat.moe_ep)


def rows(case: Case, seat: truth.Seat, sizes: Sizes) -> dict[str, dict[int, list[int]]]:
    """The elements of the sharded dims of each weight by the specification; all dims not named are whole."""
    arch, tp, cp = case.arch, heads_tp(sizes), sizes.cp
    here = placed(seat, sizes)
    queries = truth.query_heads(here, arch.num_heads, tp)
    kept = truth.kept_heads(here, arch.num_heads, tp, cp)
    kv = sorted({truth.kv_head_of(head, arch.num_heads, arch.num_kv_heads) for head in queries})
    mla = arch.mla
    q_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else arch.head_dim
    v_width = mla.v_head_dim if mla else arch.head_dim
    found = {
        **{name: {0: wide(queries, q_width)} for name in ("q", "q_b", "q_bias")},
        **{name: {0: wide(kv, arch.head_dim)} for name in ("k", "v", "k_bias", "v_bias")},
        **{name: {0: truth.cut(arch.vocab_size, sizes.tp * cp, seat.ffn)} for name in ("embed", "head")},
        "o": {1: wide(kept, v_width)},
    }
    if mla:
        up = list(range(mla.qk_nope_head_dim + mla.v_head_dim))
        found["k_up"] = {0: queries, 1: up[: mla.qk_nope_head_dim]}
        found["v_up"] = {0: queries if sizes.space == "value" else kept, 1: up[mla.qk_nope_head_dim :]}
    ways = sizes.tp * cp
    inner = {"mlp": truth.cut(arch.intermediate_size, ways, seat.ffn)}
    if arch.moe:
        inner["shared"] = truth.cut(arch.moe.shared_intermediate_size, ways, seat.ffn)
        inner["expert"] = truth.cut(arch.moe.intermediate_size, ways // sizes.ep, seat.moe_tp)
    for family, columns in inner.items():
        found |= {f"{family}_gate": {0: columns}, f"{family}_up": {0: columns}, f"{family}_down": {1: columns}}
    return found


def wide(heads: list[int], width: int) -> list[int]:
    """The rows of `heads` in a matrix with `width` rows a head."""
    return [head * width + row for head in heads for row in range(width)]


@quick
@given(cases(most=32, context_most=16), st.integers(0, 80))
def test_transfers(case: Case, blocks: int) -> None:
    """Every generation rank gets each piece of its cache once, from a rank that has it."""
    context, generation = case.sizes("context"), case.sizes("generation")
    work = generation.cp * case.arch.num_layers * case.arch.num_kv_heads  # of each block
    blocks = min(blocks, 2 * generation.cp + 1, 1 + 40_000 // work)
    event(f"blocks: {blocks}")
    source, target = (case.instances(role)[0] for role in ("context", "generation"))
    kept = holders(case, source, context, blocks)
    for sender_dp in {0, context.tp - 1} if context.dp else [None]:
        for receiver_dp in {0, generation.tp - 1} if generation.dp else [None]:
            arrived: dict[int, list[truth.Piece]] = defaultdict(list)
            for t in case.plan.transfers:
                sender, receiver = case.ranks(source)[t.source], case.ranks(target)[t.target]
                if sender_dp not in (None, sender.tp_rank) or receiver_dp not in (None, receiver.tp_rank):
                    continue
                for block in (j for j in range(blocks) if j % generation.cp == t.cp_rank):
                    for piece in (truth.Piece(i, h, block) for i in numbers(t.layers) for h in numbers(t.kv_heads)):
                        assert t.source in kept[piece], f"{t} sends {piece}"
                        arrived[t.target].append(piece)
            for rank, wanted in needs(case, generation, blocks).items():
                if receiver_dp in (None, case.ranks(target)[rank].tp_rank):
                    assert len(arrived[rank]) == len(wanted)
                    assert set(arrived[rank]) == wanted


def holders(case: Case, source: Instance, sizes: Sizes, blocks: int) -> dict[truth.Piece, set[int]]:
    """Who has each piece after prefill; where KV heads are fewer than tp, several ranks."""
    held: dict[truth.Piece, set[int]] = defaultdict(set)
    for rank, pieces in _pieces(case, "context", sizes, range(blocks)):
        for piece in pieces:
            held[piece].add(rank)
    if case.arch.num_kv_heads % heads_tp(sizes) == 0 or case.arch.mla:
        seats = [placed(seat, sizes) for seat in truth.seats(sizes.tp, 1, sizes.pp, sizes.ep)]
        layers = truth.stage_layers(case.arch.num_layers, sizes.pp, list(sizes.partition or ()))
        kv_heads = None if case.arch.mla else case.arch.num_kv_heads
        assert held == truth.context_holders(seats, layers, kv_heads, heads_tp(sizes), blocks)
    assert len(source.ranks) == sizes.tp * sizes.pp
    return held


def needs(case: Case, sizes: Sizes, blocks: int) -> dict[int, set[truth.Piece]]:
    owners = truth.tape(blocks, 1, sizes.cp).tolist()
    seats = truth.seats(sizes.tp, sizes.cp, sizes.pp, sizes.ep)
    return {
        rank: {piece for piece in pieces if owners[piece.block] == seats[rank].cp}
        for rank, pieces in _pieces(case, "generation", sizes, range(blocks))
    }


def _pieces(case: Case, role: Role, sizes: Sizes, blocks: range) -> list[tuple[int, list[truth.Piece]]]:
    """All (layer, KV head, block) that a seat's queries attend to, whoever of its cp group stores them."""
    layers = truth.stage_layers(case.arch.num_layers, sizes.pp, list(sizes.partition or ()))
    found = []
    for seat in truth.seats(sizes.tp, sizes.cp, sizes.pp, sizes.ep):
        queries = truth.query_heads(placed(seat, sizes), case.arch.num_heads, heads_tp(sizes))
        kv = sorted({truth.kv_head_of(head, case.arch.num_heads, case.arch.num_kv_heads) for head in queries})
        found.append((seat.rank, [truth.Piece(i, h, b) for i in layers[seat.pp] for h in kv for b in blocks]))
    return found


@quick
@given(cases())
def test_every_legal_plan_is_proven(case: Case) -> None:
    assert find_flaws(case.plan) == []
