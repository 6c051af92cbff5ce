"""Every byte of a member has its place, and what is missing is said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.memory_plan import (
    MemberMemory,
    MemoryDemand,
    free_bytes,
    max_slots,
    memory_use,
)

DEMAND = MemoryDemand(num_moe_layers=5, num_experts=8, expert_bytes=100, shared_bytes=1000, kv_cache_bytes=300,
                      buffer_bytes=200)
FIXED = DEMAND.fixed_bytes + 50


def members(*free: int) -> tuple[MemberMemory, ...]:
    return tuple(MemberMemory(f"node-{index}", FIXED + left, 50) for index, left in enumerate(free))


@given(st.integers(-2000, 9000), st.booleans(), st.integers(0, 2000))
def test_every_byte_has_its_place(left: int, takes_requests: bool, kv_cache_bytes: int) -> None:
    memory = MemberMemory("node", FIXED + left, 50)
    num_slots = max_slots(memory, DEMAND, takes_requests, kv_cache_bytes)
    use = memory_use(memory, DEMAND, num_slots, takes_requests)
    assert use.budget_bytes == memory.budget_bytes
    assert 0 <= num_slots <= DEMAND.num_slots
    if num_slots:
        assert use.free_bytes >= 0 and use.kv_cache_bytes >= (max(300, kv_cache_bytes) if takes_requests else 0)


def test_without_requests_there_is_room_for_more_experts() -> None:
    memory = MemberMemory("node", FIXED + 1000, 50)
    assert max_slots(memory, DEMAND) == 10
    assert max_slots(memory, DEMAND, takes_requests=False) == 23
    assert free_bytes(memory, DEMAND, takes_requests=False) == 2300
    use = memory_use(memory, DEMAND, 23, takes_requests=False)
    assert (use.shared_bytes, use.kv_cache_bytes, use.buffer_bytes, use.free_bytes) == (0, 0, 200, 0)


def test_the_kv_cache_takes_what_experts_leave() -> None:
    use = memory_use(MemberMemory("node", FIXED + 1000, 50), DEMAND, 4, takes_requests=True)
    assert (use.expert_bytes, use.kv_cache_bytes, use.free_bytes) == (400, 900, 0)
