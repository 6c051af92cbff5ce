"""The placement of survivors: nothing moves that need not, nobody gets more than its room, or what is missing is
said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.layer.error import PlacementError
from cluster.planner.placement_without import Room, placement_without, survivors
from model.placement import ExpertRate, Placement
from serving.link.epoch import Epoch, RequestShare
from tests.cluster.coordinator.group_reports import member
from tests.placements import contiguous_placement

EXPERT_BYTES = 100
FAST, SLOW = ExpertRate(1.0, 1.0), ExpertRate(4.0, 4.0)


def epoch_of(placement: Placement, takes: tuple[bool, ...] | None = None) -> Epoch:
    takes = takes or (True,) * placement.num_members
    shares = tuple(RequestShare(1 / sum(takes) if one else 0.0, 64 if one else 0) for one in takes)
    return Epoch(5, tuple(member(f"n{rank}") for rank in range(placement.num_members)), placement, "", shares)


@st.composite
def epochs(draw: st.DrawFn) -> tuple[Epoch, frozenset[int], Room]:
    num_members, num_experts = draw(st.integers(2, 5)), draw(st.integers(1, 8))
    ranks = st.sets(st.integers(0, num_members - 1), min_size=1).map(lambda some: tuple(sorted(some)))
    layer = st.tuples(*[ranks] * num_experts)
    holders = tuple(draw(st.lists(layer, min_size=1, max_size=4)))
    rate = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(lambda pair: ExpertRate(*pair))
    rates = draw(st.just(()) | st.tuples(*[rate] * num_members))
    takes = draw(st.lists(st.booleans(), min_size=num_members, max_size=num_members).filter(any))
    gone = draw(st.sets(st.integers(0, num_members - 1), min_size=1, max_size=num_members - 1))
    room = draw(st.tuples(*[st.integers(-200, 1500)] * (num_members - len(gone))))
    return (epoch_of(Placement(num_members, holders, rates), tuple(takes)), frozenset(gone),
            Room(room, EXPERT_BYTES, draw(st.floats(0.1, 100))))


@settings(max_examples=100)
@given(epochs())
def test_survivors_hold_everything_within_their_room_or_what_is_missing_is_said(
        drawn: tuple[Epoch, frozenset[int], Room]) -> None:
    epoch, gone, room = drawn
    left = [rank for rank in range(len(epoch.members)) if rank not in gone]
    held = {(layer, expert, left.index(rank)) for layer, experts in enumerate(epoch.placement.holders)
            for expert, ranks in enumerate(experts) for rank in ranks if rank in left}
    num_experts = sum(map(len, epoch.placement.holders))
    lacking = num_experts - len(held) - sum(room.slots_M)      # spare copies may all be dropped
    if lacking > 0 or not any(epoch.takes_requests(rank) for rank in left):
        with pytest.raises(PlacementError) as raised:
            placement_without(epoch, gone, room)
        missing = f"{lacking * EXPERT_BYTES} bytes are missing"
        assert "takes requests" in str(raised.value) or missing in str(raised.value)
        return
    planned = placement_without(epoch, gone, room)
    now = {(layer, expert, rank) for layer, experts in enumerate(planned.placement.holders)
           for expert, ranks in enumerate(experts) for rank in ranks}
    assert {(layer, expert) for layer, expert, _ in now} == {
        (layer, expert) for layer, experts in enumerate(epoch.placement.holders) for expert in range(len(experts))}
    for rank in range(len(left)):
        before, after = ({copy for copy in copies if copy[2] == rank} for copies in (held, now))
        assert len(after) - len(before) <= room.slots_M[rank]
    without_holder = num_experts - len({copy[:2] for copy in held})
    assert len(now - held) == without_holder                    # nothing is loaded that somebody holds
    assert held <= now or without_holder > sum(room.slots_M)    # and what is held stays, unless room is short
    assert sum(share.fraction for share in planned.shares) == pytest.approx(1)
    for rank, old in enumerate(left):
        assert (planned.shares[rank].fraction > 0) == epoch.takes_requests(old)
        assert planned.shares[rank].token_budget == epoch.shares[old].token_budget
    assert planned.figures is None and planned.placement.num_members == len(left)


def test_lost_experts_go_to_fast_members_in_every_layer() -> None:
    """Both lack four of each layer's eight experts; the one four times as fast takes all but one."""
    placement = replace(contiguous_placement(6, 8, (2, 2, 4)), rates=(FAST, SLOW, FAST))
    planned = placement_without(epoch_of(placement), {2}, Room((10_000, 10_000), EXPERT_BYTES, 8.0))
    assert [len(planned.placement.experts_of(layer, 0)) for layer in range(6)] == [6] * 6
    assert planned.placement.rates == (FAST, SLOW)


def test_room_that_is_short_is_divided_over_the_layers() -> None:
    placement = replace(contiguous_placement(4, 8, (2, 2, 4)), rates=(FAST, SLOW, FAST))
    planned = placement_without(epoch_of(placement), {2}, Room((8 * EXPERT_BYTES, 8 * EXPERT_BYTES), EXPERT_BYTES))
    assert [len(planned.placement.experts_of(layer, 0)) for layer in range(4)] == [4] * 4


def test_a_spare_copy_makes_room_for_an_expert_that_nobody_holds() -> None:
    placement = Placement(3, (((0, 1), (0, 1), (2,)),), (FAST, SLOW, FAST))
    planned = placement_without(epoch_of(placement), {2}, Room((0, 0), EXPERT_BYTES))
    assert planned.placement.holders == (((0,), (0, 1), (1,)),)     # the slow one's copy went


def test_what_is_missing_is_said_of_every_survivor() -> None:
    epoch = epoch_of(contiguous_placement(2, 6, (2, 2, 2)))
    with pytest.raises(PlacementError) as raised:
        placement_without(epoch, {0}, Room((150, -50), EXPERT_BYTES))
    text = str(raised.value)
    assert "300 bytes are missing for 3 experts" in text
    assert "member node-n1: room for 150 bytes" in text and "member node-n2: room for 0 bytes" in text


def test_survivors_without_a_role_for_requests_are_to_be_planned_for_anew() -> None:
    epoch = epoch_of(contiguous_placement(1, 4, (2, 1, 1)), (True, False, False))
    with pytest.raises(PlacementError, match="nobody who is left takes requests"):
        placement_without(epoch, {0}, Room((10_000, 10_000), EXPERT_BYTES))


def test_survivors_keep_the_order_of_their_ranks() -> None:
    epoch = epoch_of(contiguous_placement(1, 4, (1, 1, 1, 1)))
    assert survivors(epoch, {0, 2}) == (epoch.members[1], epoch.members[3])
