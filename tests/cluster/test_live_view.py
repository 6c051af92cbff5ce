"""What the live page shows is what the coordinator says and the router counts."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.view import (
    ClusterStatus,
    GroupPhase,
    MembershipChange,
    PlacementStatus,
    RouterReport,
    ShardState,
    View,
)
from cluster.live_view import LiveView, group_view
from serving.engine.engine import ShardLoad
from serving.engine.expert_load import ExpertLoad
from serving.ingress.http.ui.snapshot import MAX_MEMBERS
from serving.link.epoch import Epoch, PlacementChange, ShardStatus, WorkRatio
from serving.metrics import RouterMetrics
from serving.router.router_load import RouterLoad
from tests.cluster.coordinator.group_reports import member
from tests.placements import contiguous_placement, even_shares

MEMBERS = tuple(member(name, budget=1_400 << 20) for name in "abc")
EPOCH = Epoch(4, MEMBERS, contiguous_placement(2, 6, (1, 2, 3)), "", even_shares(3), revision=2, changes=(
    PlacementChange("auto-4-1", "8% faster", 3 << 20, 1, 2, "done"),))
RATIOS = (WorkRatio(1.0, 1.0, 50), WorkRatio(1.1, 2.5, 50), None)
PLACEMENT = PlacementStatus(EPOCH, None, ExpertLoad(2, 6, np.ones((2, 6), dtype=np.float32).tobytes()), RATIOS)


def a_status() -> ClusterStatus:
    shards = tuple((one, ShardStatus(one.shard_id, 4, ShardState.READY, num_running=2, kv_blocks_total=8,
                                     kv_blocks_free=2, resident_bytes=700 << 20)) for one in reversed(MEMBERS))
    died = MembershipChange(3, 4, "died", ("cpu-d",), 1_700_000_000.0, 2.0, 3.0, None, 95.0)
    return ClusterStatus(View(GroupPhase.READY, EPOCH, leaving=("cpu-c",)), shards,
                         (RouterReport("r1", "node-a", "127.0.0.1:8000", "", 4, is_ready=True),), (died,))


class Coordinator:
    """Answers with a status, or not."""

    def __init__(self) -> None:
        self.answer: ClusterStatus | None = a_status()

    async def status(self) -> ClusterStatus:
        if self.answer is None:
            raise CoordinatorUnavailableError("it restarts")
        return self.answer


def test_members_are_in_the_order_of_ranks_with_load_and_work() -> None:
    loads = {("cpu-b", "cpu"): ShardLoad(tokens_per_s=80.0, step_s=0.25)}
    group = group_view(a_status(), PLACEMENT, loads, "tiny")
    assert (group.model, group.health, group.epoch, group.revision) == ("tiny", "healthy", 4, 2)
    assert [(one.node, one.rank, one.num_running, one.kv_part) for one in group.members] == [
        ("node-a", 0, 2, 0.75), ("node-b", 1, 2, 0.75), ("node-c", 2, 2, 0.75)]
    assert [one.tokens_per_s for one in group.members] == [None, 80.0, None]
    assert [one.experts_over_profile for one in group.members] == [1.0, 2.5, None]
    assert [one.is_leaving for one in group.members] == [False, False, True]
    assert group.straggler == "cpu-b" and "experts take 2.50 x" in group.straggler_reason
    assert [(change.kind, change.text) for change in group.changes] == [
        ("members", "epoch 3 → 4: died cpu-d (detected 2 ms, regrouped 3 ms, resumed 95 ms)"),
        ("placement", "revision 1 → 2: 8% faster, 3.0 MiB moved, done")]


def test_without_an_epoch_it_says_what_is_awaited() -> None:
    waiting = ClusterStatus(View(GroupPhase.WAITING, None, "two shards are missing"), a_status().shards, ())
    group = group_view(waiting, None, {}, "tiny")
    assert (group.health, group.why, group.epoch) == ("waiting", "two shards are missing", 0)
    assert [one.rank for one in group.members] == [None] * 3 and not group.straggler


def test_many_members_are_counted_and_not_all_shown() -> None:
    shards = tuple((member(f"m{number}"), ShardStatus(f"cpu-m{number}", 0, ShardState.WAITING))
                   for number in range(MAX_MEMBERS + 5))
    group = group_view(ClusterStatus(View(GroupPhase.WAITING, None), shards, ()), None, {}, "tiny")
    assert (len(group.members), group.num_members) == (MAX_MEMBERS, MAX_MEMBERS + 5)


async def test_a_look_has_rates_of_this_router_and_the_experts() -> None:
    coordinator, metrics, now_s = Coordinator(), RouterMetrics(), [1000.0]
    live = LiveView("tiny", coordinator, metrics, lambda: RouterLoad(num_held=3, num_decoding=2), lambda: now_s[0])
    assert (await live.look()).load is None
    live.placement = PLACEMENT
    metrics.requests.first_token_arrived(after_s=0.05, num_prompt_tokens=4, num_cached_tokens=0)
    metrics.requests.tokens_arrived(num_tokens=9, after_s=0.9)
    now_s[0] += 2.0
    found = await live.look()
    assert found.requests.rates.tokens_per_s == 5.0 and found.requests.num_held == 3
    assert found.requests.rates.ttft_p50_s is not None and 0.04 < found.requests.rates.ttft_p50_s <= 0.06
    assert found.holders is not None and found.holders.sets == ((0,), (1,), (2,))
    assert found.load is not None and set(base64.b64decode(found.load.cells)) == {found.load.steps}


async def test_what_was_told_of_another_epoch_is_not_shown() -> None:
    live = LiveView("tiny", Coordinator(), RouterMetrics(), RouterLoad, lambda: 0.0)
    live.placement = replace(PLACEMENT, epoch=replace(EPOCH, number=3))
    found = await live.look()
    assert found.load is None and not found.group.straggler


async def test_while_the_coordinator_is_away_the_page_shows_what_was_and_says_so() -> None:
    coordinator = Coordinator()
    live = LiveView("tiny", coordinator, RouterMetrics(), RouterLoad, lambda: 0.0)
    before = await live.look()
    coordinator.answer = None
    after = await live.look()
    assert after.group.members == before.group.members and before.group.why == ""
    assert "what was known before: it restarts" in after.group.why
