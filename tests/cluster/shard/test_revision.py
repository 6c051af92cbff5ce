"""Placements change while a real group serves: nothing that it computes changes, and what cannot be is refused."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from safetensors.torch import save_file

from cluster.coordinator.client import ViewFollower
from cluster.coordinator.view import GroupPhase, View
from cluster.shard.executor import GroupExecutor, PreparedRevision
from cluster.shard.loaded_model import LoadedModel
from cluster.shard.revision import RevisionError, RevisionFollower, RevisionMaker, refuse_what_needs_an_epoch
from model.dispatch.dispatcher import Dispatcher
from model.placement import Placement
from model.step import SamplingSpec
from model.transport.address import EndpointAddress
from serving.engine.request import FinishReason, Submission, TokenEvent
from serving.link.epoch import DeviceFacts, Epoch, Member, RequestShare, WorkRatio
from tests.cluster.shard.revision_jobs import ScriptedCoordinator, Standing
from tests.deadlines import PATIENCE_S
from tests.model.conftest import CONFIG, tiny_tensors
from tests.placements import even_shares
from tests.process_pool import ProcessPool, free_rendezvous

JOBS = "tests.cluster.shard.revision_jobs"
NUM_LAYERS, NUM_EXPERTS = 2, 4
PLENTY = 1 << 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer and two MoE layers."""
    folder = tmp_path_factory.mktemp("revisions")
    tensors = tiny_tensors()
    tensors |= {name.replace("layers.1.", "layers.2."): tensor.flip(0).contiguous() for name, tensor in tensors.items()
                if "layers.1." in name}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3, "max_position_embeddings": 1024}))
    return folder


def placement_of(rng: random.Random, num_members: int) -> Placement:
    """Any holders, with copies."""
    return Placement(num_members, tuple(tuple(
        tuple(sorted(rng.sample(range(num_members), rng.randint(1, num_members)))) for _ in range(NUM_EXPERTS))
        for _ in range(NUM_LAYERS)))


def member(rank: int, port: int, budget_bytes: int, endpoint: EndpointAddress | None = None) -> Member:
    facts = DeviceFacts("cpu", "test", "test", budget_bytes, 1)
    return Member(f"s{rank}", "default", f"n{rank}", f"node-{rank}", f"127.0.0.1:{port}", facts, endpoint=endpoint)


class LiveGroup:
    """Members in the workers 0, 1, ... of the pool."""

    def __init__(self, pool: ProcessPool, folder: Path, placement: Placement, shares: tuple[RequestShare, ...] = (),
                 budgets: dict[int, int] | None = None) -> None:
        self._pool = pool
        self._ranks = range(placement.num_members)
        opened = pool.run(f"{JOBS}:open_link", [()] * len(self._ranks))
        members = tuple(member(rank, port, (budgets or {}).get(rank, PLENTY), endpoint)
                        for rank, (port, endpoint) in enumerate(opened))
        self.epoch = Epoch(1, members, placement, free_rendezvous(),
                           shares or even_shares(placement.num_members))
        self.call("join", *((folder, self.epoch, rank) for rank in self._ranks))

    def call(self, method: str, *arguments_of_member: tuple[object, ...]) -> list[object]:
        """Return the result of each member; without arguments, of all."""
        arguments = arguments_of_member or ((),) * len(self._ranks)
        return self._pool.run(f"{JOBS}:do", [(method, *own) for own in arguments])

    def show(self, following: Epoch | None) -> None:
        """The coordinator's view, with the revision to prepare; a member that runs that one already says so."""
        self.call("show", *[(View(GroupPhase.READY, self.epoch, next=following),)] * len(self._ranks))

    def next_epoch(self, revision: int, placement: Placement, **fields: object) -> Epoch:
        return replace(self.epoch, revision=revision, placement=placement, **fields)  # type: ignore[arg-type]

    def until(self, *standing_of_member: tuple[int, int, int]) -> list[Standing]:
        """Until each member has these (revision, prepared_revision, failed_revision)."""
        return self.call("until_standing", *standing_of_member)  # type: ignore[return-value]

    def change(self, following: Epoch, *standing_of_member: tuple[int, int, int]) -> list[Standing]:
        """To `following`, as far as it gets. By default everybody switches."""
        self.show(following)
        all_switched = [(following.revision, following.revision, 0)] * len(self._ranks)
        standings = self.until(*(standing_of_member or all_switched))
        if all(each.revision == following.revision for each in standings):
            self.epoch = following
        return standings

    def leave(self) -> list[float]:
        """-> rows counted by each member."""
        return [load.num_rows for load in self._pool.run(f"{JOBS}:leave", [()] * len(self._ranks))]


@pytest.fixture
def live_group(worker_pool: ProcessPool, folder: Path) -> Iterator[Callable[..., LiveGroup]]:
    worker_pool.run("tests.cluster.shard.group_jobs:leave", [()] * 4)
    yield lambda *arguments, **named: LiveGroup(worker_pool, folder, *arguments, **named)
    worker_pool.run(f"{JOBS}:abandon", [()] * 4)


def submissions(rank: int) -> tuple[Submission, ...]:
    rng = random.Random(rank)
    return tuple(Submission(f"{rank}.{i}", tuple(rng.randrange(64) for _ in range(rng.randint(1, 20))),
                            SamplingSpec(temperature=float(i % 2), seed=i, num_logprobs=3), rng.randint(120, 200))
                 for i in range(3))


Outputs = dict[str, list[object]]


def outputs_of(events: list[TokenEvent]) -> Outputs:
    found: Outputs = {}
    for event in events:
        assert event.finish_reason in (None, FinishReason.LENGTH), event.error
        found.setdefault(event.request_id, []).extend(zip(event.token_ids, event.logprobs, strict=True))
    return found


@pytest.mark.multinode
def test_streams_do_not_notice_that_placements_change(live_group: Callable[..., LiveGroup]) -> None:
    """Two members with requests and one with experts only, against one member that holds all."""
    alone = live_group(Placement(1, (((0,),) * NUM_EXPERTS,) * NUM_LAYERS))
    alone.call("submit", (submissions(0) + submissions(1),))
    [events] = alone.call("ended", (6,))
    expected = outputs_of(events)  # type: ignore[arg-type]
    alone.leave()

    rng = random.Random(3)
    shares = (RequestShare(0.5, 16), RequestShare(0.5, 8), RequestShare(0.0, 0))
    group = live_group(placement_of(rng, 3), shares)
    group.call("submit", (submissions(0),), (submissions(1),), ((),))
    for revision in range(1, 6):
        group.call("until_steps", *[(6 * revision,)] * 3)
        lower = tuple(replace(share, token_budget=share.token_budget - revision) for share in shares[:2])
        placement = placement_of(rng, 3)
        standings = group.change(group.next_epoch(revision, placement, shares=(*lower, shares[2])))
        assert [each.token_budget for each in standings] == [16 - revision, 8 - revision, 0]
        assert [each.num_expert_copies for each in standings] == [
            placement.num_experts_of(rank) for rank in range(3)]
        assert all(each.num_steps < 120 for each in standings), "the streams ended too soon for this test"
    ended = group.call("ended", (3,), (3,), (0,))
    assert outputs_of([event for events in ended for event in events]) == expected  # type: ignore[attr-defined]
    of_0, of_1, of_host = cast("list[WorkRatio]", group.call("work_ratio"))      # over all those placements
    assert of_0.own is not None and of_0.own > 0 and of_1.own is not None and of_1.own > 0
    assert of_host.own is None and of_host.experts is not None and of_host.experts > 0
    num_rows = sum(len(each.prompt_token_ids) + each.max_tokens - 1 for each in submissions(0) + submissions(1))
    assert sum(group.leave()) == pytest.approx(num_rows * NUM_LAYERS * 2, rel=1e-5)     # each to 2 experts


@pytest.mark.multinode
def test_an_idle_group_switches_and_goes_on_when_a_member_has_no_memory(live_group: Callable[..., LiveGroup]) -> None:
    first = Placement(3, (((0,), (0,), (1,), (2,)),) * NUM_LAYERS)
    without_1 = Placement(3, (((2,), (0,), (1,), (0,)), ((0,), (0,), (1,), (2,))))
    group = live_group(first, budgets={1: 1000})
    group.change(group.next_epoch(1, without_1))        # nothing changes on member 1, and no request runs

    more_on_1 = Placement(3, (((2,), (1,), (0,), (0,)), ((0,), (0,), (1,), (2,))))
    _, failed, _ = group.change(group.next_epoch(2, more_on_1), (1, 2, 0), (1, 1, 2), (1, 2, 0))
    numbers = re.match(r"revision 2 failed: the experts of 1 changed layers take (\d+) bytes beside those that run; "
                       r"budget 1000 - used (\d+) - (\d+) for the steps leaves (-\d+): (\d+) bytes are missing",
                       failed.detail)
    assert numbers is not None, failed.detail
    needed, used, kept, left, missing = map(int, numbers.groups())
    assert (needed, left, missing) == (3 * 16 * 32 * 2 + 16 * 32 * (4 + 2), 1000 - used - kept, needed - left)

    group.show(None)                                    # the coordinator gives up, and those who could let go
    group.until((1, 1, 0), (1, 1, 2), (1, 1, 0))
    group.change(group.next_epoch(3, first), (3, 3, 0), (3, 3, 2), (3, 3, 0))
    group.call("submit", (submissions(0),), ((),), ((),))
    group.call("ended", (3,), (0,), (0,))
    group.leave()


# What a member does on its own.


def epoch_of(revision: int, *shares: float, num_members: int = 2, number: int = 1) -> Epoch:
    members = tuple(member(rank, 1, PLENTY) for rank in range(num_members))
    placement = Placement(num_members, (((0,), (num_members - 1,)),))
    given = tuple(RequestShare(share, 10) for share in shares) or even_shares(num_members)
    return Epoch(number, members, placement, "", given, revision=revision)


@pytest.mark.parametrize(("wanted", "message"), [
    (epoch_of(1, 0.0, 1.0), "rank 0 takes requests and revision 1 says that it holds experts only.*make a new epoch"),
    (epoch_of(1, num_members=3), "other members than epoch 1.*make a new epoch"),
    (replace(epoch_of(1), placement=Placement(2, (((0,), (1,), (1,)),))), "1 layers of another model")])
def test_what_needs_another_epoch_is_refused(wanted: Epoch, message: str) -> None:
    with pytest.raises(RevisionError, match=message):
        refuse_what_needs_an_epoch(epoch_of(0, 0.5, 0.5), wanted, 0)


class ManualMaker(RevisionMaker):
    """Prepares what the test allows, and fails for the others."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.allowed: set[int] = set()
        self.failing: set[int] = set()

    def make(self, running: Epoch, model: LoadedModel, wanted: Epoch, check: Callable[[], None]) -> PreparedRevision:
        self.begun.append(wanted.revision)
        while wanted.revision not in self.allowed:
            check()
            time.sleep(0.0005)
            if wanted.revision in self.failing:
                raise OSError("the disk is gone")
        return PreparedRevision(wanted, model, cast(Dispatcher, None), {})


class OfferedTo:
    """The executor's part: what is on offer, until the test lets it be taken."""

    def __init__(self) -> None:
        self.running = 0
        self.prepared: PreparedRevision | None = None

    @property
    def prepared_revision(self) -> int:
        return self.running if self.prepared is None else self.prepared.epoch.revision

    def offer(self, prepared: PreparedRevision) -> None:
        assert self.prepared is None
        self.prepared = prepared

    async def withdraw(self) -> None:
        self.prepared = None


class OneMember:
    """A follower with its surroundings."""

    def __init__(self) -> None:
        self.maker, self.executor, self.coordinator = ManualMaker(), OfferedTo(), ScriptedCoordinator(epoch_of(0))
        self.views = ViewFollower(self.coordinator)
        model = cast(LoadedModel, None)
        self.follower = RevisionFollower(epoch_of(0), model, self.maker, self.views, lambda: None)

    async def __aenter__(self) -> OneMember:
        executor = cast(GroupExecutor, self.executor)
        self._tasks = [asyncio.create_task(self.views.run()),
                       asyncio.create_task(self.follower.run(executor, lambda: None))]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self.follower.close()
        await asyncio.wait(self._tasks)
        assert all(task.cancelled() for task in self._tasks)

    def show(self, following: Epoch | None) -> None:
        self.coordinator.show(View(GroupPhase.READY, epoch_of(0), next=following))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():      # noqa: ASYNC110
                await asyncio.sleep(0.0005)


async def test_the_revision_that_is_wanted_last_is_prepared() -> None:
    async with OneMember() as one:
        one.show(epoch_of(1))
        await one.until(lambda: one.maker.begun == [1])
        one.show(epoch_of(2))           # while the first is being prepared, which then is in vain
        one.maker.allowed = {2, 4}
        await one.until(lambda: one.executor.prepared_revision == 2)
        one.show(None)
        await one.until(lambda: one.executor.prepared is None)
        one.show(epoch_of(4, number=7))         # of another epoch: none of ours
        one.show(epoch_of(4))
        await one.until(lambda: one.executor.prepared_revision == 4)
        assert one.maker.begun == [1, 2, 4] and one.follower.failed_revision == 0


async def test_what_runs_or_has_failed_is_not_prepared_again() -> None:
    async with OneMember() as one:
        one.maker.allowed, one.maker.failing = {1, 3}, {2}
        one.show(epoch_of(1))
        await one.until(lambda: one.executor.prepared is not None)
        assert one.executor.prepared is not None
        one.executor.running, prepared, one.executor.prepared = 1, one.executor.prepared, None
        one.follower.has_switched(prepared, {})
        one.show(epoch_of(2))
        await one.until(lambda: one.follower.failed_revision == 2)
        assert one.follower.detail == "revision 2 failed: the disk is gone" and one.follower.epoch.revision == 1
        one.show(None)
        one.show(epoch_of(2))
        one.show(epoch_of(3))
        await one.until(lambda: one.executor.prepared_revision == 3)
        assert one.maker.begun == [1, 2, 3]


async def test_closing_ends_what_is_being_prepared() -> None:
    async with OneMember() as one:
        one.show(epoch_of(1))
        await one.until(lambda: one.maker.begun == [1])
    assert one.executor.prepared is None
