"""The predicted step: the sum of its barriers, each as long as the slowest member."""

from __future__ import annotations

import pytest

from cluster.planner.costs.cost_model import StepPrediction, predict_step
from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.layer.problem import Split
from model.placement import Placement
from serving.link.epoch import DeviceProfile, RequestShare
from tests.cluster.planner.planned_members import model_args, profile
from tests.placements import contiguous_placement

ARGS = model_args()


def shares(*parts: float) -> list[RequestShare]:
    return [RequestShare(part, 16) for part in parts]


def predicted(profiles: list[DeviceProfile], placement: Placement, splits: tuple[Split, ...] | None,
              shares: list[RequestShare], workload: Workload) -> StepPrediction:
    return predict_step(StepCosts(ARGS, 2, profiles, workload), placement.holders, splits, shares)


def test_alone_a_step_is_what_the_member_is_busy() -> None:
    placement = contiguous_placement(3, 16, (16,))
    prediction = predicted([profile()], placement, None, shares(1.0), Workload(512, 100))
    time = prediction.members[0]
    assert time.experts_s == pytest.approx(3 * 512 * 2 * 5e-6, rel=1e-3)
    assert time.exchange_s == 0.0 and time.overhead_s == pytest.approx(3e-6)
    assert prediction.step_s == pytest.approx(time.busy_s)
    assert prediction.tokens_per_s == pytest.approx(512 / prediction.step_s)


def test_each_part_waits_for_the_slowest() -> None:
    placement = contiguous_placement(3, 16, (8, 8))
    prediction = predicted([profile(1.0), profile(2.0)], placement, None, shares(0.25, 0.75), Workload(512, 100))
    slow, fast = prediction.members
    assert slow.experts_s == pytest.approx(2 * fast.experts_s)
    attention_s = max(slow.attention_s, fast.attention_s) + slow.overhead_s
    exchange_s = max(slow.exchange_s, fast.exchange_s)
    head_s = max(slow.head_s, fast.head_s)
    assert prediction.step_s == pytest.approx(attention_s + slow.experts_s + exchange_s + head_s)


def test_the_given_split_counts() -> None:
    copied = Placement(2, (((0, 1),) * 14 + ((0,), (1,)),) * 3)
    split = (((0.5, 0.5),) * 14 + ((1.0,), (1.0,)),) * 3
    equal = predicted([profile(1.0), profile(3.0)], copied, split, shares(0.5, 0.5), Workload(512, 100))
    best = predicted([profile(1.0), profile(3.0)], copied, None, shares(0.5, 0.5), Workload(512, 100))
    assert equal.members[0].experts_s == pytest.approx(3 * equal.members[1].experts_s)
    assert best.members[0].experts_s == pytest.approx(best.members[1].experts_s)
    assert best.step_s < equal.step_s


@pytest.mark.parametrize(("one", "num_rows", "context_tokens", "limit"), [
    (profile(), 1, 10, "memory bandwidth"),
    (profile(), 4096, 10, "compute"),
    (profile(), 64, 1_000_000, "memory bandwidth"),
    (profile(latency_s=0.1), 64, 10, "link"),
    (profile(bytes_per_s=1e3), 64, 10, "link"),
    (profile(overhead_s=0.1), 64, 10, "overhead"),
])
def test_the_limit_is_what_takes_longest(one: DeviceProfile, num_rows: int, context_tokens: int, limit: str) -> None:
    prediction = predicted([one, one], contiguous_placement(3, 16, (8, 8)), None, shares(0.5, 0.5),
                           Workload(num_rows, context_tokens))
    assert prediction.limit == limit


def test_a_member_with_nothing_to_do_costs_nothing() -> None:
    workload = Workload(64, 100)
    alone = predicted([profile()], contiguous_placement(3, 16, (16,)), None, shares(1.0), workload)
    slow = profile(0.01, latency_s=1.0, overhead_s=1.0)
    beside = predicted([profile(), slow], contiguous_placement(3, 16, (16, 0)), None, shares(1.0, 0.0), workload)
    assert beside.step_s == pytest.approx(alone.step_s)
    assert beside.members[1].busy_s == 0.0


def test_where_every_member_holds_everything_each_computes_its_own_rows() -> None:
    """No exchange, and no waiting for one another within a step."""
    everywhere = Placement(2, (((0, 1),) * 16,) * 3)
    prediction = predicted([profile(1.0), profile(3.0)], everywhere, None, shares(0.25, 0.75), Workload(1024, 100))
    slow, fast = prediction.members
    assert slow.exchange_s == fast.exchange_s == 0.0
    assert slow.experts_s == pytest.approx(3 * 256 * 2 * 5e-6, rel=1e-3)
    assert fast.experts_s == pytest.approx(slow.experts_s, rel=1e-3)
    assert prediction.step_s == pytest.approx(max(slow.busy_s, fast.busy_s))


def test_a_member_without_rows_need_not_hold_anything_for_the_others_rows_to_stay() -> None:
    some = Placement(3, (((0, 1),) * 16,) * 3)
    three = predicted([profile()] * 3, some, None, shares(0.5, 0.5, 0.0), Workload(64, 100))
    assert [time.exchange_s for time in three.members] == [0.0, 0.0, 0.0]
