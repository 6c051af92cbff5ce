"""What the coordinator hears becomes the policy's snapshot, and its decision what is shown."""

from __future__ import annotations

import pytest

from cluster.autoscaler.fleet import Work
from cluster.coordinator.autoscaling import UNMEASURED_READY_S, ArrivalTotals, Autoscaler, Heard, PoolStarts
from cluster.coordinator.group_size import PoolSize
from model.placement import Placement
from serving.config import parse_config
from serving.link.epoch import Epoch, Member, RequestShare
from serving.router.router_load import RouterLoad
from tests.cluster.coordinator.group_reports import member, rules

CONFIG = parse_config({"model": {"path": "x"}, "pools": [{"name": "cpu", "replicas": 2, "max_replicas": 6}],
                       "autoscaling": {"ttft_slo_s": 2.0, "itl_slo_s": 0.1, "keep_alive_s": 20}})
BUSY = RouterLoad(num_held=400, num_waiting_tokens=10_000_000, num_arrived=400)


def heard(num_members: int = 2, wanted: int = 2, loads: dict[str, RouterLoad] | None = None,
          leaving: tuple[str, ...] = ()) -> Heard:
    members: tuple[Member, ...] = tuple(member(str(number), budget=5000) for number in range(num_members))
    shares = (RequestShare(1 / num_members, 64),) * num_members
    epoch = Epoch(1, members, Placement(num_members, (((0,),) * 6,) * 2), "", shares)
    return Heard({"cpu": PoolSize(1, wanted, 6)}, epoch, leaving, loads or {})


@pytest.fixture
def autoscaler() -> Autoscaler:
    return Autoscaler(CONFIG, rules().plan)


def test_an_idle_service_keeps_what_is_wanted_until_it_was_kept_alive(autoscaler: Autoscaler) -> None:
    assert autoscaler.decide(heard(), 0.0).wanted == autoscaler.decide(heard(), 19.0).wanted == {"cpu": 2}
    assert autoscaler.decide(heard(), 20.0).wanted == {"cpu": 1}


def test_it_grows_for_what_waits_and_shows_why(autoscaler: Autoscaler) -> None:
    decision = autoscaler.decide(heard(loads={"r": BUSY}), 0.0)
    assert decision.wanted == {"cpu": 6}
    shown = autoscaler.status(decision, "", 123.0)
    assert shown.wanted == {"cpu": 6} and shown.kind == "first token" and shown.ratio > 1
    assert [(change.before, change.after, change.at_s) for change in shown.changes] == [(2, 6, 123.0)]
    assert shown.waits_for == f"4 of pool cpu, usually {UNMEASURED_READY_S:.0f} s"


def test_what_could_not_begin_is_said_and_is_no_change(autoscaler: Autoscaler) -> None:
    shown = autoscaler.status(autoscaler.decide(heard(loads={"r": BUSY}), 0.0), "Serve does not answer", 1.0)
    assert shown.changes == () and shown.waits_for.startswith("Serve does not answer; 4 of pool cpu")


def test_who_leaves_is_not_counted_as_ready(autoscaler: Autoscaler) -> None:
    busy = {"r": RouterLoad(num_held=1, num_waiting_tokens=1)}
    one, two = (autoscaler.decide(heard(leaving=leaving, loads=busy), 0.0).backlog_s
                for leaving in ((heard().epoch.members[0].shard_id,), ()))
    assert one > two


def test_the_start_of_a_replica_is_measured() -> None:
    starts = PoolStarts()
    assert starts.observe("a", 2, 2, 0.0) is None and starts.ready_s("a") == UNMEASURED_READY_S
    assert starts.observe("a", 3, 2, 5.0) == 5.0 == starts.observe("a", 3, 2, 9.0)
    assert starts.observe("a", 3, 3, 12.0) is None and starts.ready_s("a") == 7.0


def test_arrivals_are_added_up_whatever_routers_come_and_go() -> None:
    totals = ArrivalTotals()
    old = RouterLoad(1, 2, 3, 4, num_arrived=1000, num_prompt_tokens=5000, num_output_tokens=900)
    assert totals.work({"a": old}) == Work(1, 2, 3, 4, 0, 0, 0)
    more = RouterLoad(1, 2, 3, 4, num_arrived=1003, num_prompt_tokens=5030, num_output_tokens=906)
    assert totals.work({"a": more, "b": RouterLoad(num_held=5)}) == Work(6, 2, 3, 4, 3, 30, 6)
    assert totals.work({"b": RouterLoad(num_arrived=2)}) == Work(0, 0, 0, 0, 5, 30, 6)
    assert totals.work({}) == Work(0, 0, 0, 0, 5, 30, 6)
