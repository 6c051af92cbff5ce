"""Coordinator, members and a router as state machines: reports and views come late, twice, in any order, or never, and
members may be unable to reach each other.

Members are models of what cluster/shard does with a view; the coordinator is the real one, and it may be lost too.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.group_size import GroupSize, PoolSize
from cluster.coordinator.view import GroupPhase, RouterReport, ShardState, View
from serving.config import PlacementConfig
from serving.link.epoch import Epoch, Member, ShardStatus
from tests.cluster.coordinator.group_reports import member, rules, status_of

NUM_MEMBERS = 3
NODES = "abcd"
# With fewer than NUM_MEMBERS too, for cuts may leave only one that all hear.
RULES = replace(rules(NUM_MEMBERS, PlacementConfig(policy="even")), size=GroupSize(
    {"cpu": PoolSize(1, NUM_MEMBERS, NUM_MEMBERS)}, settle_s=5.0, fixed_members=NUM_MEMBERS))
STEPS = st.integers(0, len(NODES) - 1)
IN_EPOCH = (ShardState.LOADING, ShardState.LOADED, ShardState.JOINING, ShardState.READY)


@dataclass
class Shard:
    """One process: it takes every epoch once, in the order of their numbers, and leaves it when it has ended."""

    member: Member
    state: ShardState = ShardState.WAITING
    epoch: Epoch | None = None
    view: View = View(GroupPhase.WAITING, None)     # the latest that it has heard
    unheard: frozenset[str] = frozenset()           # shard ids, of any epoch
    is_newcomer: bool = False

    def status(self) -> ShardStatus:
        status = status_of(self.member, self.state, self.epoch.number if self.epoch else 0)
        lost = () if self.state in IN_EPOCH else tuple(sorted(self.unheard_members()))
        return replace(status, lost_peers=lost, is_newcomer=self.is_newcomer and self.state in IN_EPOCH)

    def unheard_members(self) -> frozenset[str]:
        """Return those of its latest epoch that do not answer."""
        return self.unheard & {one.shard_id for one in self.epoch.members} if self.epoch else frozenset()

    def breaks(self) -> None:
        """Leave the epoch because somebody did not answer."""
        if self.state in IN_EPOCH:
            self.state = ShardState.WAITING

    def act(self) -> None:
        """Go one step on towards what the view says."""
        view, epoch = self.view, self.epoch
        if epoch is not None and self.state in IN_EPOCH:
            if view.has_ended(epoch.number) or view.has_withdrawn(epoch.number):
                self.state = ShardState.WAITING
            elif self.unheard_members():
                self.breaks()
            elif self.state is ShardState.LOADING:
                self.state = ShardState.LOADED
            elif view.epoch is not None and view.epoch.number == epoch.number and view.phase in (
                    GroupPhase.JOINING, GroupPhase.READY):
                self.epoch, self.is_newcomer = view.epoch, False
                self.state = ShardState.JOINING if self.state is ShardState.LOADED else ShardState.READY
            return
        for wanted in (view.epoch, view.coming):
            if wanted is not None and (epoch is None or wanted.number > epoch.number) \
                    and wanted.rank_of(self.member.shard_id) is not None:
                self.epoch, self.state, self.is_newcomer = wanted, ShardState.LOADING, wanted is view.coming
                return


class AnyOrder(RuleBasedStateMachine):
    RULES = RULES

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now_s = 0.0
        self.num_started = self.num_coordinators = 0
        self.shards: dict[int, Shard | None] = dict.fromkeys(range(len(NODES)))
        self.cuts: set[frozenset[int]] = set()      # between nodes
        self.reports: list[tuple[Member, ShardStatus, Epoch | None]] = []       # that were sent and may yet come
        self.views: list[tuple[str, View]] = []
        self.epochs: dict[int, tuple[Member, ...]] = {}         # by number, as anybody has seen them
        self.coordinator = self.new_coordinator()
        for node in self.shards:
            self.start(node)

    def new_coordinator(self) -> Coordinator:
        async def make() -> Coordinator:
            self.num_coordinators += 1
            return Coordinator(self.RULES, lambda: self.now_s, lambda: self.now_s, 1000 * self.num_coordinators)
        return self.loop.run_until_complete(make())

    def start(self, node: int) -> None:
        self.num_started += 1
        one = replace(member(NODES[node], budget=1_000_000), shard_id=f"s{self.num_started}")
        self.shards[node] = Shard(one)

    def ask(self) -> View:
        """Return the coordinator's view when nothing is being planned."""
        async def ask() -> View:
            view = await self.coordinator.watch("", 0.0)
            while "is planned" in view.why:
                view = await self.coordinator.watch(view.key, 5.0)
            return view
        view = self.loop.run_until_complete(ask())
        self.note(view)
        return view

    def note(self, view: View) -> None:
        """No number is ever given to two epochs."""
        for epoch in (view.epoch, view.coming):
            if epoch is not None:
                assert self.epochs.setdefault(epoch.number, epoch.members) == epoch.members

    def tell(self, shard_member: Member, status: ShardStatus, epoch: Epoch | None) -> None:
        """Bring a report to the coordinator, and with it the epoch if it asks for that."""
        async def tell() -> None:
            if await self.coordinator.report(shard_member, status) and epoch is not None:
                await self.coordinator.report(shard_member, status, epoch)
        self.loop.run_until_complete(tell())

    def act(self, node: int, shard: Shard) -> None:
        others = (self.shards[other] for cut in self.cuts if node in cut for other in cut - {node})
        shard.unheard = frozenset(other.member.shard_id for other in others if other is not None)
        shard.act()

    @rule(node=STEPS, other=STEPS)
    def a_cable_is_cut(self, node: int, other: int) -> None:
        if node != other:
            self.cuts.add(frozenset({node, other}))

    @rule()
    def the_network_is_mended(self) -> None:
        self.cuts.clear()

    @rule(node=STEPS)
    def a_shard_acts_and_reports(self, node: int) -> None:
        shard = self.shards[node]
        if shard is not None:
            self.act(node, shard)
            self.reports.append((shard.member, shard.status(), shard.epoch))

    @rule(node=STEPS)
    def a_shard_breaks(self, node: int) -> None:
        shard = self.shards[node]
        if shard is not None:
            shard.breaks()

    @precondition(lambda self: self.reports)
    @rule(draw=st.data(), is_lost=st.booleans(), stays=st.booleans())
    def a_report_comes(self, draw: st.DataObject, is_lost: bool, stays: bool) -> None:
        index = draw.draw(st.integers(0, len(self.reports) - 1))
        report = self.reports[index]
        if not stays:
            self.reports.pop(index)
        if not is_lost:
            self.tell(*report)

    @rule(node=STEPS)
    def a_shard_hears(self, node: int) -> None:
        shard = self.shards[node]
        if shard is not None:
            shard.view = self.ask()

    @rule(node=STEPS)
    def a_shard_dies_and_another_starts(self, node: int) -> None:
        self.start(node)

    @rule(node=STEPS)
    def a_shard_dies(self, node: int) -> None:
        self.shards[node] = None

    @rule(seconds=st.sampled_from([0.1, 3.0, 7.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def the_coordinator_is_lost(self) -> None:
        self.coordinator = self.new_coordinator()

    @invariant()
    def members_of_one_epoch_know_each_other(self) -> None:
        """Whoever steps under one number steps with the same others in the same ranks."""
        for shard in self.shards.values():
            if shard is not None and shard.epoch is not None:
                assert self.epochs[shard.epoch.number] == shard.epoch.members

    def teardown(self) -> None:
        """When faults end and everybody is heard, the group serves, whatever cuts last, and goes on to."""
        try:
            for node, shard in self.shards.items():
                if shard is None:
                    self.start(node)
            num_ready = 0
            for _ in range(160):
                self.now_s += 1.0
                for node, shard in self.shards.items():
                    assert shard is not None
                    shard.view = self.ask()
                    self.act(node, shard)
                    self.tell(shard.member, shard.status(), shard.epoch)
                self.loop.run_until_complete(self.a_router_reports())
                num_ready = num_ready + 1 if self.ask().phase is GroupPhase.READY else 0
                if num_ready == (20 if self.cuts else 1):
                    break
            view = self.ask()
            assert view.phase is GroupPhase.READY and view.epoch is not None, view.why
            ready = {shard.member.shard_id for shard in self.shards.values()
                     if shard is not None and shard.state is ShardState.READY}
            assert {one.shard_id for one in view.epoch.members} <= ready
            nodes = {node for node, shard in self.shards.items() if shard is not None
                     and view.epoch.rank_of(shard.member.shard_id) is not None}
            assert not any(cut <= nodes for cut in self.cuts) and (num_ready == 20 or not self.cuts)
        finally:
            plans = asyncio.all_tasks(self.loop)
            if plans:
                self.loop.run_until_complete(asyncio.wait(plans))
            self.loop.close()

    async def a_router_reports(self) -> None:
        await self.coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", 0, is_ready=False))


class AnyOrderOfSleep(AnyOrder):
    """The service falls asleep and wakes up at any moment, too; who is dismissed ends, or not yet."""

    RULES = replace(RULES, size=GroupSize({"cpu": PoolSize(1, NUM_MEMBERS, NUM_MEMBERS)}, settle_s=5.0))

    @rule()
    def all_are_to_go(self) -> None:
        self.loop.run_until_complete(self.a_router_reports())
        self.loop.run_until_complete(self.coordinator.sleep())
        view = self.ask()
        assert view.is_asleep and view.epoch is None and "wakes on the first request" in view.why

    @rule(num=st.integers(1, NUM_MEMBERS))
    def some_are_wanted(self, num: int) -> None:
        async def want() -> bool:
            heard = self.coordinator.heard()
            if is_asleep := heard is not None and heard.epoch is None:
                await self.coordinator.scale("cpu", num)
            return is_asleep
        if self.loop.run_until_complete(want()):
            assert "asleep since" in self.ask().why

    @rule(node=STEPS)
    def a_shard_that_is_dismissed_ends(self, node: int) -> None:
        shard = self.shards[node]
        if shard is not None and shard.member.shard_id in shard.view.dismissed:
            self.shards[node] = None
            self.loop.run_until_complete(self.coordinator.forget_shard(shard.member.shard_id))

    def teardown(self) -> None:
        self.some_are_wanted(NUM_MEMBERS)
        super().teardown()
