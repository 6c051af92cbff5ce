"""Exchanges of members that are threads of this process, over shared memory and over TCP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import GroupError
from model.transport.group import TransportGroup
from model.transport.peer_error import PeerError, Reason
from tests.deadlines import PATIENCE_S
from tests.model.transport.members import Members, exchange, exchange_sizes, failure

NUM_MEMBERS = 3
HUGE = 5 << 20          # more than a ring, a piece of a message and the buffers of a socket hold


@pytest.fixture(scope="module", params=[True, False], ids=["memory", "tcp"])
def members(request: pytest.FixtureRequest) -> Iterator[Members]:
    members = Members(NUM_MEMBERS, request.param)
    yield members
    members.close()


sizes = st.one_of(st.just(0), st.integers(1, 300), st.sampled_from([4096, 65536, (256 << 10) + 1]), st.just(HUGE))
exchanges = st.lists(st.lists(sizes, min_size=NUM_MEMBERS ** 2, max_size=NUM_MEMBERS ** 2), min_size=1, max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes_of_exchange=exchanges, seed=st.integers(0, 9), num_members=st.integers(2, NUM_MEMBERS))
def test_everybody_gets_what_was_sent_to_it(members: Members, sizes_of_exchange: list[list[int]], seed: int,
                                            num_members: int) -> None:
    groups = members.open(num_members=num_members)

    def run(rank: int) -> None:
        for sizes in sizes_of_exchange:
            sizes_MM = np.array(sizes).reshape(NUM_MEMBERS, NUM_MEMBERS)[:num_members, :num_members]
            exchange_sizes(groups[rank], sizes_MM, seed)
        groups[rank].close()
    members.run(run, list(range(num_members)))


def test_a_gather_brings_everybodys_bytes_to_all(members: Members) -> None:
    groups = members.open()

    def gather(rank: int) -> bytes:
        own, received = np.full(100, rank, np.uint8), np.zeros(300, np.uint8)
        groups[rank].gather(own.ctypes.data, received.ctypes.data, 100)
        groups[rank].close()
        return received.tobytes()
    assert members.run(gather) == [bytes([0] * 100 + [1] * 100 + [2] * 100)] * 3


def test_a_group_of_one_copies(members: Members) -> None:
    [group] = members.open(num_members=1)
    assert exchange(group, [b"own"], [3]) == [b"own"]
    group.close()


def test_two_groups_beside_each_other_do_not_mix(members: Members) -> None:
    """On the same connections, with one thread for each group and member, at different paces."""
    first, second = members.open(), members.open()
    sizes_MM = np.array([[0, 70_000, 9], [HUGE, 5, 4096], [1, 0, 300_000]])

    def exchange_often(group: TransportGroup, times: int) -> None:
        for seed in range(times):
            exchange_sizes(group, sizes_MM if group in first else sizes_MM.T, seed)
    with ThreadPoolExecutor(NUM_MEMBERS) as threads:
        others = [threads.submit(exchange_often, group, 8) for group in second]
        members.run(lambda rank: exchange_often(first[rank], 20))
        for other in others:
            other.result(PATIENCE_S)
    members.run(lambda rank: (first[rank].close(), second[rank].close()))


def test_what_comes_for_a_later_exchange_of_another_group_waits_beside(members: Members) -> None:
    """Rank 0 sends for the second group first; rank 1 asks for the first group's message first, on one thread."""
    first, second = members.open(num_members=2), members.open(num_members=2)
    with ThreadPoolExecutor(1) as thread:
        early = thread.submit(exchange, second[0], [b"", b"second" * 100_000], [0, 2])
        later = members.start(0, lambda: exchange(first[0], [b"", b"first"], [0, 0]))
        assert members.start(1, lambda: exchange(first[1], [b"", b""], [5, 0])).result(PATIENCE_S)[0] == b"first"
        later.result(PATIENCE_S)
        assert exchange(second[1], [b"ok", b""], [600_000, 0])[0] == b"second" * 100_000
        assert early.result(PATIENCE_S)[1] == b"ok"
    members.run(lambda rank: (first[rank].close(), second[rank].close()), [0, 1])


def test_late_messages_of_a_group_that_is_over_are_thrown_away(members: Members) -> None:
    """Rank 0 fails in the middle of a huge message; the next group on the same connection gets its own bytes."""
    for _ in range(3):
        abort_in_the_middle(members, *members.open(num_members=2))
        again = members.open(num_members=2)
        exchanged = [members.start(rank, partial(exchange_sizes, group, np.array([[1, 70_000], [HUGE, 0]]), 5))
                     for rank, group in enumerate(again)]
        for rank in (0, 1):
            exchanged[rank].result(PATIENCE_S)
            again[rank].close()


def abort_in_the_middle(members: Members, sender: TransportGroup, receiver: TransportGroup) -> None:
    sending = members.start(0, lambda: failure(lambda: exchange(sender, [b"", b"\xab" * HUGE], [0, 1])))
    sender.abort()
    assert sending.result(PATIENCE_S).reason == Reason.ABORTED
    sender.close()
    receiver.close()


def test_abort_ends_a_waiting_exchange_and_all_later_ones(members: Members) -> None:
    groups = members.open()
    waiting = members.start(0, lambda: failure(lambda: exchange(groups[0], [b"x"] * 3, [1] * 3)))
    groups[0].abort()
    error = waiting.result(PATIENCE_S)
    assert (error.reason, error.rank) == (Reason.ABORTED, None)
    assert failure(lambda: exchange(groups[0], [b"x"] * 3, [1] * 3)).reason == Reason.ABORTED
    for group in groups:
        group.close()


def test_a_member_that_leaves_ends_the_wait_of_the_others(members: Members) -> None:
    groups = members.open()
    waiting = [members.start(rank, lambda rank=rank: failure(lambda: exchange(groups[rank], [b"x"] * 3, [1] * 3)))
               for rank in (0, 1)]
    groups[2].close()
    for error in (future.result(PATIENCE_S) for future in waiting):
        assert (error.reason, error.rank) == (Reason.LEFT, 2)
        assert "rank 2 has left" in str(error)
    for group in groups:
        group.close()


def test_what_a_member_sent_before_it_left_still_arrives(members: Members) -> None:
    groups = members.open(num_members=2)
    members.run(lambda rank: exchange_sizes(groups[rank], np.array([[0, HUGE], [0, 0]]), 1), [0, 1])
    groups[0].close()
    assert failure(lambda: exchange(groups[1], [b"", b""], [0, 0])).reason == Reason.LEFT
    groups[1].close()


def open_to_wait_for(members: Members) -> tuple[list[TransportGroup], float]:
    """Return a group with about the shortest deadline in which it could be formed here, and that."""
    timeout_s = 0.2
    while True:
        try:
            return members.open(timeout_s=timeout_s), timeout_s
        except PeerError:       # on a busy machine
            timeout_s *= 2


def test_a_deadline_names_who_is_late_and_the_next_group_forms(members: Members) -> None:
    groups, timeout_s = open_to_wait_for(members)
    errors = members.run(lambda rank: failure(lambda: exchange(groups[rank], [b"x"] * 3, [1] * 3)), [0, 2])
    # The one that gives up first hangs up on rank 1; nobody is told of a wrong reason.
    assert {error.reason for error in errors} <= {Reason.DEADLINE, Reason.CLOSED, Reason.LEFT}
    assert errors[0].rank == 1 and f"did not answer within {timeout_s:g} s" in str(errors[0])
    for group in groups:
        group.close()
    again = members.open()
    members.run(lambda rank: exchange_sizes(again[rank], np.ones((3, 3), int), 3))
    members.run(lambda rank: again[rank].close())


@pytest.mark.parametrize("size", [2, 300_000])
def test_members_that_exchange_something_else_are_out_of_step(members: Members, size: int) -> None:
    groups = members.open(num_members=2)
    members.start(0, lambda: exchange(groups[0], [b"", bytes(size)], [0, 0]))
    error = failure(lambda: exchange(groups[1], [b"", b""], [size - 1, 0]))
    assert (error.reason, error.rank) == (Reason.OUT_OF_STEP, 0)
    assert "all members must join the next epoch" in str(error)
    for group in groups:
        group.close()


def test_a_group_that_is_closed_says_so(members: Members) -> None:
    [group] = members.open(num_members=1)
    group.close()
    group.close()
    assert failure(lambda: exchange(group, [b""], [0])).reason == Reason.NO_GROUP


def test_numbers_of_groups_only_rise(members: Members) -> None:
    members.open(num_members=1)[0].close()
    with pytest.raises(GroupError, match="number groups in the order"):
        members.endpoints[0].open_group(1, members.addresses[:1], 0, 1.0)


def test_members_that_mean_others_by_a_group_do_not_form_it(members: Members) -> None:
    group_id = members.next_group_id()
    errors = members.run(lambda rank: failure(lambda: members.endpoints[rank].open_group(
        group_id, members.addresses[:2 + rank], rank, 0.5)), [0, 1])
    assert (errors[0].reason, errors[0].rank) == (Reason.OUT_OF_STEP, 1)
    assert errors[1].rank is not None
