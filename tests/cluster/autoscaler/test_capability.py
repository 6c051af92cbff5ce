"""What a fleet lacks for a demand is said of the part that lacks most."""

from __future__ import annotations

import pytest

from cluster.autoscaler.capability import GROUP_EFFICIENCY, Capability
from cluster.autoscaler.demand import Demand
from tests.cluster.autoscaler.fleets import DEMAND, RULES, facts, fleet, pool


def test_it_says_what_lacks_most() -> None:
    able = Capability(fleet(), RULES)
    for demand, kind in ((Demand(num_waiting_tokens=90_000), "first token"), (Demand(num_decoding=50), "decode"),
                         (Demand(num_kv_tokens=9000), "KV cache")):
        found = able.shortfall((2,), demand)
        assert found.kind == kind and found.ratio > 1
        assert able.shortfall((8,), demand).ratio < found.ratio


def test_who_cannot_keep_up_is_seen_before_a_queue_is_there() -> None:
    able = Capability(fleet(), RULES)
    keeps_up, falls_behind = Demand(prompt_tokens_per_s=1750), Demand(prompt_tokens_per_s=5000)
    assert able.shortfall((2,), keeps_up).ratio == 0 and able.lasting_shortfall((2,), keeps_up).ratio > 1
    assert able.later_wait_s((2,), falls_behind) == pytest.approx((5000 - 1800) * 2 / 1800)
    assert able.shortfall((2,), falls_behind).text == "0 prompt tokens wait, and as 5,000/s come, soon for 3.6 s"
    assert able.lasting_shortfall((2,), keeps_up).kind == "arrivals"


def test_memory_that_is_missing_is_counted_in_bytes() -> None:
    able = Capability(fleet(), RULES)
    assert able.missing_bytes((2,)) == 0 and able.memory_ratio((2,)) == 1.0
    assert able.missing_bytes((1,)) == 5000
    assert able.missing_bytes((0,)) == 10_000 + DEMAND.fixed_bytes


def test_prompts_wait_for_what_is_ready_and_then_for_what_comes() -> None:
    able = Capability(fleet(pool(of=facts(ready_s=2.0))), RULES)
    rate = 1000 * GROUP_EFFICIENCY
    assert able.wait_s((2,), Demand(num_waiting_tokens=9000)) == pytest.approx(9000 / (2 * rate))
    assert able.wait_s((4,), Demand(num_waiting_tokens=9000)) == pytest.approx(2 + (9000 - 4 * rate) / (4 * rate))
    assert able.wait_s((4,), Demand(num_waiting_tokens=900)) == pytest.approx(900 / (2 * rate))


def test_with_nothing_ready_prompts_wait_for_the_start() -> None:
    able = Capability(fleet(pool(wanted=0)), RULES)
    assert able.wait_s((0,), Demand(num_waiting_tokens=1)) == float("inf")
    assert able.wait_s((1,), Demand(num_waiting_tokens=1000)) == pytest.approx(3.0)


def test_sequences_that_decode_leave_less_for_prompts() -> None:
    able = Capability(fleet(), RULES)
    assert able.wait_s((2,), Demand(num_waiting_tokens=900, num_decoding=18)) == pytest.approx(
        2 * able.wait_s((2,), Demand(num_waiting_tokens=900)))


def test_stuck_pools_count_with_what_is_ready() -> None:
    seen = fleet(pool(wanted=6, ready=2))
    assert Capability(seen, RULES, frozenset("a")).shortfall((6,), Demand(num_decoding=50)) == \
        Capability(seen, RULES).shortfall((2,), Demand(num_decoding=50))


def test_kv_room_is_what_experts_and_shared_weights_leave() -> None:
    assert Capability(fleet(), RULES).kv_room((2,)) == 2 * (5000 + DEMAND.kv_cache_bytes) - 10_000
    assert Capability(fleet(), RULES).kv_room((1,)) == 0.0
