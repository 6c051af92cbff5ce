"""The policy grows what is worth its price, shrinks what is lost least, and holds still under noise."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaler.capability import Capability, ScalingRules
from cluster.autoscaler.demand import DemandHistory
from cluster.autoscaler.fleet import FleetSnapshot, PoolState, ReplicaFacts, Work
from cluster.autoscaler.policy import STUCK_S, Decision, decide
from tests.cluster.autoscaler.fleets import RULES, facts, fleet, pool

ASLEEP = replace(RULES, idle_timeout_s=60.0)


def decided(*pools: PoolState, work: Work | None = None, rules: ScalingRules = RULES, now_s: float = 0.0) -> Decision:
    return decide(fleet(*pools, work=work), rules, DemandHistory(since_s=-100.0), now_s)


def follow(before: FleetSnapshot, decision: Decision, work: Work) -> FleetSnapshot:
    """Return the fleet in which everything that is wanted is there."""
    pools = tuple(replace(one, num_wanted=decision.wanted[one.name], num_ready=decision.wanted[one.name])
                  for one in before.pools)
    return FleetSnapshot(pools, work)


def test_nothing_changes_while_what_is_there_is_enough() -> None:
    decision = decided(pool(), work=Work(num_held=5, num_waiting_tokens=1000, num_decoding=10))
    assert decision.wanted == {"a": 2} and not decision.changes and decision.waits_for == ""


def test_it_grows_as_far_as_the_prompts_that_wait_take() -> None:
    decision = decided(pool(), work=Work(num_held=20, num_waiting_tokens=6_000))
    assert decision.wanted["a"] == 6
    assert decision.changes[0].why.startswith("6,000 prompt tokens wait")
    assert "of pool a, usually 2 s" in decision.waits_for
    assert decision.backlog_s == pytest.approx(6_000 / 1800)


def test_it_grows_for_sequences_that_decode_too_slowly_and_for_kv_room() -> None:
    assert decided(pool(), work=Work(num_held=60, num_decoding=60)).signal.kind == "decode"
    assert decided(pool(), work=Work(num_held=60, num_decoding=60)).wanted["a"] == 5
    assert decided(pool(), work=Work(num_held=2, num_kv_tokens=4000)).changes[0].why.endswith("have some")


def test_who_gains_most_for_its_price_grows() -> None:
    """The fast one is three times as fast: worth twice the price, not four times. A slow start counts like a price."""
    work = Work(num_held=60, num_decoding=100)

    def grown(fast: ReplicaFacts, cost: float) -> Decision:
        return decided(pool("fast", of=fast, cost=cost), pool("slow"), work=work)
    assert grown(facts(3.0), 2.0).wanted["slow"] == 2
    assert grown(facts(3.0), 4.0).wanted["fast"] == 2
    assert grown(facts(3.0, ready_s=60.0), 2.0).wanted["fast"] == 2


def test_who_is_lost_least_shrinks() -> None:
    decision = decided(pool("fast", of=facts(3.0)), pool("slow", wanted=6), work=Work(num_held=1, num_decoding=1))
    assert decision.wanted["slow"] < 6
    assert [change.pool for change in decision.changes][-1] == "slow"


def test_it_shrinks_only_when_the_peak_is_older_than_the_time_to_keep_alive() -> None:
    busy, idle = Work(num_held=90, num_decoding=90), Work()
    seen = fleet(pool(wanted=6), work=busy)
    history = decide(seen, RULES, DemandHistory(), 0.0).history
    early = decide(replace(seen, work=idle), RULES, history, 29.0)
    assert early.wanted == {"a": 6}
    assert decide(replace(seen, work=idle), RULES, early.history, 61.0).wanted == {"a": 2}      # what holds the model


def test_who_has_just_begun_to_look_takes_nothing_away() -> None:
    first = decide(fleet(pool(wanted=6)), RULES, DemandHistory(), 50.0)
    assert first.wanted == {"a": 6}
    assert decide(fleet(pool(wanted=6)), RULES, decide(fleet(pool(wanted=6)), RULES, first.history, 79.0).history,
                  80.0).wanted == {"a": 2}


def test_all_go_when_nothing_has_come_for_long_and_the_first_request_brings_them_back() -> None:
    first = decide(fleet(), ASLEEP, DemandHistory(), 0.0)
    assert first.wanted == {"a": 2}
    assert decide(fleet(), ASLEEP, first.history, 59.0).wanted == {"a": 2}
    gone = decide(fleet(), ASLEEP, first.history, 60.0)
    assert gone.wanted == {"a": 0} and gone.changes[0].why == "no request for 60 s"
    asleep = fleet(pool(wanted=0))
    assert decide(asleep, ASLEEP, gone.history, 90.0).wanted == {"a": 0}
    woken = decide(replace(asleep, work=Work(num_held=1, num_waiting_tokens=10, num_arrived=1)), ASLEEP, gone.history,
                   91.0)
    assert woken.wanted == {"a": 2} and woken.history.idle_since_s is None


def test_a_service_that_was_woken_by_hand_stays_awake_for_the_idle_time() -> None:
    history = decide(fleet(), ASLEEP, DemandHistory(), 0.0).history
    for now_s in (60.0, 90.0):
        history = decide(fleet(pool(wanted=0)), ASLEEP, history, now_s).history
    woken = decide(fleet(), ASLEEP, history, 1000.0)
    assert woken.wanted == {"a": 2}
    assert decide(fleet(), ASLEEP, woken.history, 1059.0).wanted == {"a": 2}
    assert decide(fleet(), ASLEEP, woken.history, 1060.0).wanted == {"a": 0}


def test_a_service_of_which_nothing_is_known_wakes_as_large_as_it_began() -> None:
    """Another coordinator put it to sleep; the least of a pool may not hold the model."""
    unknown = PoolState("a", 1, 8, 0, 0, None, num_start=3)
    assert decided(unknown, work=Work(num_held=1, num_arrived=1), rules=ASLEEP).wanted == {"a": 3}


def test_other_pools_take_the_place_of_replicas_that_do_not_come() -> None:
    stuck = replace(pool("cheap", wanted=4, ready=2), awaited_since_s=0.0)
    work = Work(num_held=80, num_decoding=80)
    assert decided(stuck, pool("dear", cost=9.0), work=work, now_s=STUCK_S).wanted["dear"] == 2
    late = decided(stuck, pool("dear", cost=9.0), work=work, now_s=STUCK_S + 1)
    assert late.wanted["dear"] > 2 and late.wanted["cheap"] == 4
    assert "others take their place" in late.waits_for


def test_a_pool_of_which_nothing_is_known_keeps_what_it_has() -> None:
    unknown = PoolState("b", 1, 8, 3, 0, None)
    assert decided(unknown, work=Work(num_held=9, num_decoding=900)).wanted == {"b": 3}
    assert decided(unknown, pool(), work=Work(num_held=9, num_decoding=900)).wanted == {"a": 8, "b": 3}


@pytest.mark.parametrize("num_decoding", [3, 17, 34, 60, 100])
def test_a_constant_load_with_noise_changes_nothing_in_ten_minutes(num_decoding: int) -> None:
    """Arrivals, what waits and what decodes are within 10 % of what they are on average, each by itself."""
    draw = random.Random(num_decoding)
    seen, history, arrived, changes = fleet(pool(wanted=2, most=40), pool("b", of=facts(2.0), cost=1.5)), \
        DemandHistory(), 0.0, []

    def noisy(value: float) -> int:
        return round(value * draw.uniform(0.9, 1.1))
    for second in range(720):
        arrived += draw.uniform(0.9, 1.1) * num_decoding / 4
        work = Work(noisy(num_decoding), noisy(num_decoding * 20), noisy(num_decoding), noisy(num_decoding * 60),
                    int(arrived), int(arrived * 60), int(arrived * 40))
        decision = decide(replace(seen, work=work), RULES, history, float(second))
        changes += [(second, change) for change in decision.changes if second >= 120]
        seen, history = follow(seen, decision, work), decision.history
    assert changes == []


amounts = st.integers(0, 200_000)
works = st.builds(Work, amounts, amounts, st.integers(0, 2000), amounts, amounts, amounts, amounts)


@st.composite
def pools_in_order(draw: st.DrawFn) -> tuple[PoolState, ...]:
    found = []
    for name in draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")])):
        least = draw(st.integers(1, 3))
        most = least + draw(st.integers(0, 6))
        wanted = draw(st.integers(0, most + 2))
        of = facts(draw(st.floats(0.1, 10)), draw(st.floats(0, 100)), draw(st.integers(0, 8000)))
        found.append(pool(name, wanted, least, most, draw(st.integers(0, most)), of, draw(st.floats(0.1, 10))))
    return tuple(found)


def holds(pools: tuple[PoolState, ...], decision: Decision) -> bool:
    seen = fleet(*pools)
    return not Capability(seen, RULES).missing_bytes(tuple(decision.wanted[one.name] for one in pools))


@settings(max_examples=60)
@given(pools_in_order(), st.lists(works, min_size=1, max_size=6), st.sampled_from([RULES, ASLEEP]))
def test_the_limits_hold_and_so_does_the_model(pools: tuple[PoolState, ...], loads: list[Work],
                                               rules: ScalingRules) -> None:
    history = DemandHistory()
    for index, work in enumerate(loads):
        decision = decide(fleet(*pools, work=work), rules, history, 40.0 * index)
        wanted = [decision.wanted[one.name] for one in pools]
        history = decision.history
        if not any(wanted):
            assert rules.idle_timeout_s is not None and not work.num_held
            continue
        assert all(one.least <= count <= one.most for one, count in zip(pools, wanted, strict=True))
        at_most = replace(decision, wanted={one.name: one.most for one in pools})
        assert holds(pools, decision) or not holds(pools, at_most)


@settings(max_examples=40)
@given(pools_in_order(), works, st.randoms(use_true_random=False))
def test_the_order_of_pools_changes_nothing(pools: tuple[PoolState, ...], work: Work, draw: random.Random) -> None:
    shuffled = list(pools)
    draw.shuffle(shuffled)
    assert decided(*pools, work=work).wanted == decided(*shuffled, work=work).wanted
