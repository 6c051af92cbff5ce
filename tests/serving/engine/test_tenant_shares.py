"""A tenant gives way to another only beyond its part, and the more urgent do not wait for who would be later."""

from __future__ import annotations

from collections.abc import Mapping

from model.step import SamplingSpec
from serving.engine.request import Request, Submission
from serving.engine.tenant_shares import Room, TenantShares, last_to_keep, who_gives_way
from serving.priority import AGEING_S

ROOM, LACKING = Room(100, 10), Room(10, 0)
EVEN = {1: 1, 2: 1}


def request(index: int, tenant: int, num_blocks: int, priority: int = 0, arrival_s: float = 0.0) -> Request:
    made = Request(Submission(str(index), (1,), SamplingSpec(), 1, tenant=tenant, priority=priority), "r", arrival_s)
    made.arrival_index, made.block_table = index, tuple(range(num_blocks))
    return made


def give_way(newcomer: Request, running: list[Request], num_blocks: int = 10, lacking: Room = LACKING,
             weights: Mapping[int, int] = EVEN) -> list[str]:
    shares = TenantShares(running, weights, ROOM)
    return [one.request_id for one in who_gives_way(newcomer, num_blocks, running, shares, lacking)]


def test_the_last_come_of_a_tenant_beyond_its_part_give_way() -> None:
    flood = [request(index, 1, 20) for index in range(5)]
    assert give_way(request(9, 2, 0), flood) == ["4"]
    assert give_way(request(9, 2, 0), flood, lacking=Room(10, 3)) == ["4", "3", "2"]
    assert give_way(request(9, 2, 0), flood, num_blocks=45, lacking=Room(45, 1)) == ["4", "3", "2"]


def test_parts_follow_weights() -> None:
    heavy, light = [request(index, 1, 20) for index in range(4)], request(5, 2, 20)
    assert give_way(request(9, 2, 0), [*heavy, light]) == ["3"]
    assert give_way(request(9, 2, 0), [*heavy, light], weights={1: 4, 2: 1}) == []
    assert give_way(request(9, 1, 0), [*heavy[:3], request(6, 2, 20), light], weights={1: 4, 2: 1}) == ["5"]
    assert last_to_keep([*heavy, request(7, 2, 30)], TenantShares([*heavy, request(7, 2, 30)], {1: 4, 2: 1}, ROOM)
                        ).request_id == "7"


def test_nobody_gives_way_for_nothing() -> None:
    flood = [request(index, 1, 20) for index in range(5)]
    assert give_way(request(9, 1, 0), flood) == []                          # the flood's own
    assert give_way(request(9, 2, 0), flood, num_blocks=51) == []           # beyond its own part
    assert give_way(request(9, 2, 0), [*flood, request(6, 2, 45)]) == []    # likewise, with what it has
    assert give_way(request(9, 2, 0), flood, lacking=Room(80, 1)) == []     # it would not be enough
    assert give_way(request(9, 2, 0), [request(0, 1, 100)]) == []           # a tenant's last one
    assert give_way(request(9, 2, 0), [request(0, 1, 50), request(1, 2, 10)]) == []     # within its part
    assert give_way(request(9, 2, 0), [request(index, 1, 20, -1) for index in range(5)]) == []  # more urgent


def test_the_less_urgent_give_way_unless_they_have_waited_longer() -> None:
    running = [request(0, 1, 20), request(1, 1, 20, 1), request(2, 1, 20, 2)]
    assert give_way(request(9, 1, 0), running) == ["2"]
    assert give_way(request(9, 1, 0), running, lacking=Room(30, 0)) == ["2", "1"]
    assert give_way(request(9, 1, 0), running, lacking=Room(50, 0)) == []
    assert give_way(request(9, 1, 0, arrival_s=1.5 * AGEING_S), running) == ["2"]
    assert give_way(request(9, 1, 0, arrival_s=2.5 * AGEING_S), running) == []


def test_when_blocks_run_out_the_last_in_turn_of_those_beyond_their_part_gives_back() -> None:
    flood, other = [request(index, 1, 30) for index in range(2)], request(5, 2, 40)
    assert last_to_keep([*flood, other], TenantShares([*flood, other], EVEN, ROOM)).request_id == "1"
    assert last_to_keep([*flood, other], TenantShares([*flood, other], EVEN, Room(200, 20))).request_id == "5"
