"""Connections of real processes: made on demand, kept from group to group, ended by a death."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model.errors import GroupError
from model.transport.endpoint import Endpoint
from model.transport.group import TransportGroup
from model.transport.peer_error import Reason
from tests.deadlines import BEYOND_PATIENCE_S, PATIENCE_S
from tests.model.transport.members import Members, OtherProcess, as_json, exchange, exchange_sizes, failure

ZEROS = 200_000


@pytest.fixture(params=[True, False], ids=["memory", "tcp"])
def shares_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextlib.contextmanager
def group_with_processes(shares_memory: bool) -> Iterator[tuple[Endpoint, list[OtherProcess]]]:
    """Yield this process's endpoint, rank 0, and two other processes, ranks 1 and 2."""
    others = [OtherProcess(shares_memory) for _ in range(2)]
    endpoint = Endpoint("127.0.0.1", machine=None if shares_memory else "")
    try:
        yield endpoint, others
    finally:
        endpoint.close()
        for other in others:
            other.wait()


def all_addresses(endpoint: Endpoint, others: list[OtherProcess]) -> list[object]:
    return [as_json(endpoint.address), *(as_json(other.address) for other in others)]


def joined_group(endpoint: Endpoint, others: list[OtherProcess]) -> tuple[list[object], TransportGroup]:
    """Open group 1 in all of three processes -> everybody's addresses, and this one's group."""
    addresses = all_addresses(endpoint, others)
    for rank, other in enumerate(others, start=1):
        other.tell("join", 1, addresses, rank)
    group = endpoint.open_group(1, [endpoint.address, *(other.address for other in others)], 0, BEYOND_PATIENCE_S)
    assert [other.answer() for other in others] == ["joined", "joined"]
    return addresses, group


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_segments() -> int:
    return Path("/proc/self/maps").read_text().count("moesaic-pair")


def test_a_death_ends_the_wait_of_all_others_and_survivors_go_on(shares_memory: bool) -> None:
    """Killed in the middle of an exchange: the others hear of an end of file, long before their deadline."""
    with group_with_processes(shares_memory) as (endpoint, others):
        addresses, group = joined_group(endpoint, others)
        for other in others:
            other.tell("exchange", 1, ZEROS, 1_000_000)
        exchange(group, [bytes(ZEROS)] * 3, [ZEROS] * 3)
        os.kill(others[1].pid, signal.SIGSTOP)
        killer = threading.Timer(0.05, others[1].kill)
        killer.start()

        def exchange_on() -> None:
            while True:
                exchange(group, [bytes(ZEROS)] * 3, [ZEROS] * 3)
        error = failure(exchange_on)
        assert (error.reason, error.rank) == (Reason.CLOSED, 2)
        assert others[0].answer() == ["CLOSED", 2]
        killer.join()
        group.close()
        others[0].tell("join", 2, addresses[:2], 1)
        again = endpoint.open_group(2, [endpoint.address, others[0].address], 0, BEYOND_PATIENCE_S)
        assert others[0].answer() == "joined"
        others[0].tell("exchange", 2, ZEROS, 3)
        for _ in range(3):
            exchange(again, [bytes(ZEROS)] * 2, [ZEROS] * 2)
        assert others[0].answer() == "exchanged"
        again.close()


def test_a_death_is_noticed_while_nothing_is_exchanged(shares_memory: bool) -> None:
    with group_with_processes(shares_memory) as (endpoint, others):
        _, group = joined_group(endpoint, others)
        group.check()
        assert not endpoint.hangups.poll(0)
        others[1].kill()
        assert endpoint.hangups.poll(PATIENCE_S)
        error = failure(group.check)
        assert (error.reason, error.rank) == (Reason.CLOSED, 2)
        group.close()


def test_a_member_that_comes_late_is_waited_for(shares_memory: bool) -> None:
    with group_with_processes(shares_memory) as (endpoint, others):
        addresses = all_addresses(endpoint, others)
        timer = threading.Timer(0.1, lambda: others[1].tell("join", 1, addresses, 2))
        others[0].tell("join", 1, addresses, 1)
        timer.start()
        group = endpoint.open_group(1, [endpoint.address, *(other.address for other in others)], 0, BEYOND_PATIENCE_S)
        assert [other.answer() for other in others] == ["joined", "joined"]
        timer.join()
        group.close()


def test_a_member_that_never_comes_is_named() -> None:
    members = Members(2, shares_memory=True)
    members.endpoints[1].close()
    with pytest.raises(GroupError, match=r"no connection with rank 1 at 127.0.0.1:\d+ in 0.3 s.*check that it runs"):
        members.endpoints[0].open_group(1, members.addresses, 0, 0.3)
    members.close()


def test_a_stopped_member_that_comes_back_harms_nobody(shares_memory: bool) -> None:
    """Its group has ended at the others meanwhile: what it still sends is thrown away."""
    with group_with_processes(shares_memory) as (endpoint, others):
        addresses, group = joined_group(endpoint, others)
        os.kill(others[1].pid, signal.SIGSTOP)
        others[1].tell("exchange", 1, ZEROS, 1)
        others[0].tell("exchange", 1, ZEROS, 1)
        waiting = threading.Timer(0.05, group.abort)
        waiting.start()
        assert failure(lambda: exchange(group, [bytes(ZEROS)] * 3, [ZEROS] * 3)).reason == Reason.ABORTED
        group.close()
        assert others[0].answer() == ["LEFT", 0]
        others[0].tell("leave", 1)
        assert others[0].answer() == "left"
        os.kill(others[1].pid, signal.SIGCONT)
        reason, rank = others[1].answer()       # type: ignore[misc]
        assert (reason, rank) in [("LEFT", 0), ("LEFT", 1)]
        others[1].tell("leave", 1)
        assert others[1].answer() == "left"
        for rank, other in enumerate(others, start=1):
            other.tell("join", 2, addresses, rank)
        again = endpoint.open_group(2, [endpoint.address, *(other.address for other in others)], 0, BEYOND_PATIENCE_S)
        assert [other.answer() for other in others] == ["joined", "joined"]
        for other in others:
            other.tell("exchange", 2, ZEROS, 2)
        for _ in range(2):
            assert exchange(again, [bytes(ZEROS)] * 3, [ZEROS] * 3) == [bytes(ZEROS)] * 3
        assert [other.answer() for other in others] == ["exchanged", "exchanged"]
        again.close()


def exchange_once(members: Members) -> None:
    groups = members.open()
    members.run(lambda rank: exchange_sizes(groups[rank], np.full((3, 3), 100), 1))
    for group in groups:
        group.close()


def test_connections_outlive_groups_and_nothing_leaks(shares_memory: bool) -> None:
    members = Members(3, shares_memory)
    for group in members.open():
        group.close()
    fds, segments = num_fds(), shared_segments()
    assert segments == (6 if shares_memory else 0)
    for _ in range(200):
        exchange_once(members)
    assert (num_fds(), shared_segments()) == (fds, segments)
    members.close()
    gc.collect()
    assert shared_segments() == 0


def test_connections_with_processes_that_are_gone_are_let_go_of(shares_memory: bool) -> None:
    endpoint = Endpoint("127.0.0.1", machine=None if shares_memory else "")
    fds = num_fds()
    for group_id in range(1, 6):
        other = Endpoint("127.0.0.1", machine=None if shares_memory else "")
        members = [endpoint.address, other.address]
        thread = threading.Thread(target=other.open_group, args=(group_id, members, 1, BEYOND_PATIENCE_S))
        thread.start()
        endpoint.open_group(group_id, members, 0, BEYOND_PATIENCE_S).close()
        thread.join()
        other.close()
    endpoint.open_group(100, [endpoint.address], 0, 1.0).close()
    assert (num_fds(), shared_segments()) == (fds, 0)
    endpoint.close()


def test_memory_that_is_shared_has_no_name_and_is_the_owners_alone() -> None:
    members = Members(2, shares_memory=True)
    before = set(os.listdir("/dev/shm"))
    groups = members.open()
    assert set(os.listdir("/dev/shm")) == before
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if "moesaic-pair" in line)
    assert line.endswith("(deleted)")
    for group in groups:
        group.close()
    members.close()


def num_eventfds() -> int:
    """Of this process: libraries that other tests loaded have some too."""
    links = [os.readlink(path) for fd in os.listdir("/proc/self/fd") if os.path.exists(path := f"/proc/self/fd/{fd}")]
    return sum("eventfd" in link for link in links)


def test_the_child_of_a_fork_holds_no_connection_open(shares_memory: bool) -> None:
    """Else a death would not be noticed as long as a child of the dead process lives."""
    of_others = num_eventfds()
    members = Members(2, shares_memory)
    groups = members.open()
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        reason = failure(lambda: exchange(groups[0], [b"", b""], [0, 0])).reason
        maps = Path("/proc/self/maps").read_text()
        os.write(writes, f"{reason.name} {'moesaic-pair' in maps} {num_eventfds() <= of_others}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reads, 100) == b"NO_GROUP False True"
    os.close(reads)
    os.close(writes)
    members.run(lambda rank: exchange_sizes(groups[rank], np.full((2, 2), 100), 1))
    for group in groups:
        group.close()
    members.close()


def test_an_endpoint_that_closes_ends_its_groups_everywhere(shares_memory: bool) -> None:
    members = Members(2, shares_memory)
    groups = members.open()
    waiting = [members.start(rank, lambda rank=rank: failure(lambda: exchange(groups[rank], [b"x"] * 2, [1] * 2)))
               for rank in range(1)]
    members.endpoints[1].close()
    error = waiting[0].result(PATIENCE_S)
    assert (error.reason, error.rank) == (Reason.CLOSED, 1)
    assert failure(lambda: exchange(groups[1], [b"x"] * 2, [1] * 2)).reason == Reason.NO_GROUP
    members.close()
