"""What the autoscaler decides is begun at the coordinator, and what cannot be begun is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from cluster.coordinator.autoscaling import Autoscaler, Heard
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.follow_load import decide_once
from cluster.coordinator.group_size import GroupSize, PoolSize
from cluster.coordinator.pool_scale import Served, ServedPool
from cluster.coordinator.view import GroupPhase, RouterReport, ShardState, View
from cluster.planner.layer.error import PlacementError
from serving.config import AutoscalingConfig, parse_config
from serving.router.router_load import RouterLoad
from tests.cluster.coordinator.group_reports import member, rules, status_of

CONFIG = parse_config({"model": {"path": "x"}, "autoscaling": {"ttft_slo_s": 2.0},
                       "pools": [{"name": "cpu", "replicas": 2, "min_replicas": 1, "max_replicas": 6}]})
SLEEPY = CONFIG.model_copy(update={"autoscaling": AutoscalingConfig(idle_timeout_s=30.0)})
MEMBERS = tuple(member(name, budget=1_000_000) for name in "ab")
BUSY = RouterLoad(num_held=400, num_waiting_tokens=10_000_000, num_arrived=400)


class Clock:
    def __call__(self) -> float:
        return 100.0


async def running(may_scale: bool = True) -> Coordinator:
    """Return one whose group of two runs, with a router that has much to do."""
    size = GroupSize({"cpu": PoolSize(1, 2, 6)}, 30.0)
    coordinator = Coordinator(replace(rules(), size=size), Clock())
    coordinator._sizes.served = Served({}, may_scale)
    for state, epoch_number in ((ShardState.WAITING, 0), (ShardState.LOADED, 1), (ShardState.READY, 1)):
        for one in MEMBERS:
            await coordinator.report(one, status_of(one, state, epoch_number))
        view = await coordinator.watch("", 0.0)
        while view.epoch is None:
            assert coordinator.heard() is None
            view = await coordinator.watch(view.key, 60.0)
    await coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", 1, is_ready=True, load=BUSY))
    return coordinator


async def test_a_pool_grows_for_what_waits_at_the_routers(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, autoscaler = await running(), Autoscaler(CONFIG, rules().plan)
    with caplog.at_level(logging.INFO):
        await decide_once(coordinator, autoscaler, 0.0, 50.0)
    assert "pool_resized pool=cpu before=2 after=6 backlog_s=" in caplog.text
    heard = coordinator.heard()
    assert isinstance(heard, Heard) and heard.sizes["cpu"].wanted == 6 and heard.loads == {"r": BUSY}
    shown = (await coordinator.status()).autoscaler
    assert shown is not None and shown.changes[0].after == 6 and shown.changes[0].at_s == 50.0
    placement = await coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", 1, is_ready=True))
    assert placement is not None and placement.autoscaler == shown
    await decide_once(coordinator, autoscaler, 1.0, 51.0)       # what is wanted already is no change
    assert (await coordinator.status()).autoscaler is not None
    assert caplog.text.count("pool_resized") == 1


async def test_a_change_that_cannot_begin_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, autoscaler = await running(may_scale=False), Autoscaler(CONFIG, rules().plan)
    for second in range(2):
        await decide_once(coordinator, autoscaler, float(second), 50.0)
        shown = (await coordinator.status()).autoscaler
        assert shown is not None and shown.changes == ()
        assert shown.waits_for.startswith("pool cpu is not changed to 6: this application was deployed so")
    assert caplog.text.count("pool_not_resized") == 1


async def test_without_requests_all_shards_go_and_a_request_wakes_the_pools(caplog: pytest.LogCaptureFixture) -> None:
    coordinator, autoscaler = await running(), Autoscaler(SLEEPY, rules().plan)
    before = [(member.shard_id, status.state) for member, status in (await coordinator.status()).shards]

    async def look(now_s: float, num_held: int) -> View:
        load = RouterLoad(num_held=num_held, num_waiting_tokens=5 * num_held, num_arrived=num_held)
        await coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", 1, is_ready=True, load=load))
        await decide_once(coordinator, autoscaler, now_s, 50.0)
        return await coordinator.watch("", 0.0)
    with caplog.at_level(logging.INFO):
        assert (await look(0.0, 0)).epoch is not None and (await look(29.0, 0)).epoch is not None
        asleep = await look(30.0, 0)
    assert "pool_resized pool=cpu before=2 after=0 backlog_s=0.00 why=no request for 30 s" in caplog.text
    assert asleep.is_asleep and asleep.epoch is None and asleep.has_ended(1)
    assert asleep.why.startswith("asleep since ") and asleep.why.endswith(", wakes on the first request")
    assert asleep.dismissed == tuple(shard_id for shard_id, _ in before)
    status = await coordinator.status()
    assert (status.health, status.is_ready) == ("asleep", False)
    for one in MEMBERS:
        await coordinator.forget_shard(one.shard_id)
    assert (await look(1000.0, 0)).why == asleep.why
    with caplog.at_level(logging.INFO):
        waking = await look(1001.0, 1)
    assert "pool_resized pool=cpu before=0 after=1 backlog_s=" in caplog.text
    assert waking.is_asleep and waking.why.startswith("wakes up, was asleep since ") and "0 of 1 shards" in waking.why
    new = replace(MEMBERS[0], shard_id="new")
    for state, epoch_number in ((ShardState.WAITING, 0), (ShardState.LOADED, 2), (ShardState.READY, 2)):
        await coordinator.report(new, status_of(new, state, epoch_number))
        view = await coordinator.watch("", 0.0)
        while view.epoch is None:
            view = await coordinator.watch(view.key, 60.0)
    assert not view.is_asleep and view.epoch is not None and view.phase is GroupPhase.READY
    change = (await coordinator.status()).membership_changes[-1]
    assert (change.cause, change.shard_ids, change.pause_s) == ("slept", ("new",), None)


async def test_nobody_sleeps_while_a_request_waits_or_no_router_is_heard() -> None:
    coordinator = await running()
    with pytest.raises(PlacementError, match="a request has come"):
        await coordinator.sleep()
    await coordinator.forget_router("r")
    with pytest.raises(PlacementError, match="no router reports"):
        await coordinator.sleep()
    assert (await coordinator.watch("", 0.0)).phase is GroupPhase.READY


async def test_a_coordinator_that_begins_while_serve_keeps_no_shard_knows_that_it_sleeps() -> None:
    size = GroupSize({"cpu": PoolSize(1, 2, 6), "gpu": PoolSize(2, 2, 2)}, 30.0)
    coordinator = Coordinator(replace(rules(), size=size), Clock())
    coordinator._sizes._hear(Served({pool: ServedPool(0, 0) for pool in ("cpu", "gpu")}))
    view = await coordinator.watch("", 0.0)
    assert view.is_asleep and view.epoch is None
    await coordinator.scale("cpu", 3)           # and the other as many as a start takes
    assert [one.wanted for one in coordinator._sizes.size.of_pool.values()] == [3, 2]


async def test_without_a_group_nothing_is_decided() -> None:
    coordinator = Coordinator(rules(), Clock())
    await decide_once(coordinator, Autoscaler(CONFIG, rules().plan), 0.0, 50.0)
    assert (await coordinator.status()).autoscaler is None
