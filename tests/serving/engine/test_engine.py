from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from model.errors import GrammarError, GroupError
from serving.engine.engine import RATE_WINDOW_S, Engine, ShardLoad, WorkRate
from serving.engine.request import FinishReason, Submission
from serving.errors import ContextLengthError, InvalidRequestError
from tests.serving.engine.fake_group import FakeExecutor, Group, check_blocks, expected
from tests.serving.router.fake_cluster import Cluster, Shard, SlowModel, submission, turns, until

# One member.


async def test_each_router_gets_one_delivery_a_step() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        for name in "abc":
            shard.submit(submission(name), router_id="x" if name == "c" else "y")
        await cluster.until_ended()
        cluster.check()
        assert [(router_id, len(events)) for router_id, _, events in shard.deliveries] == [("y", 2), ("x", 1)] * 4
        assert [step_index for _, step_index, _ in shard.deliveries] == [1, 1, 2, 2, 3, 3, 4, 4]


async def test_submissions_during_a_step_wait_for_the_next() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.executor.in_flight = asyncio.Event()
        shard.submit(submission("a"))
        await until(lambda: len(shard.executor.plans) == 1)
        shard.submit(submission("b"))
        await turns(50)
        assert len(shard.executor.plans) == 1
        shard.executor.in_flight.set()
        await cluster.until_ended()
        assert {each.request_id for each in shard.executor.plans[1].requests} == {"a", "b"}
        cluster.check()


async def test_a_request_that_can_never_fit_is_refused_and_wakes_nobody() -> None:
    async with Cluster(num_blocks=2) as cluster:
        with pytest.raises(ContextLengthError):
            cluster.shards[0].engine.submit("r", submission("a", num_prompt=20))
        agreements = cluster.group.num_agreements
        await turns(50)
        assert cluster.group.num_agreements == agreements


async def test_cancelling_in_flight_frees_the_blocks_and_drops_the_step() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.executor.in_flight = asyncio.Event()
        shard.submit(submission("a"))
        shard.submit(submission("b"))
        await until(lambda: len(shard.executor.plans) == 1)
        shard.engine.cancel("r", "a")
        assert shard.engine.load().kv_blocks_free == 64 - 2 and shard.engine.load().num_running == 1
        shard.executor.in_flight.set()
        await cluster.until_ended()
        assert [(event.token_ids, event.finish_reason) for event in shard.events("a")] == [((), FinishReason.CANCELLED)]
        cluster.check()


async def test_cancelling_while_asleep_is_told_without_an_agreement() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.engine.hold("r", True)
        shard.submit(submission("a"))
        agreements = cluster.group.num_agreements
        shard.engine.cancel("r", "a")
        shard.engine.cancel("r", "never heard of")
        await until(lambda: shard.has_ended("a"))
        assert cluster.group.num_agreements == agreements


async def test_a_router_cannot_cancel_what_is_anothers() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.submit(submission("a"))
        shard.engine.cancel("another", "a")
        with pytest.raises(InvalidRequestError, match="'a' is already open here"):
            shard.engine.submit("another", submission("a"))
        shard.engine.disconnect("another")
        await cluster.until_ended()
        assert shard.check("a") is FinishReason.LENGTH
        cluster.check()


async def test_a_disconnected_router_loses_its_requests_and_no_others() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.engine.submit("gone", submission("a", max_tokens=100))
        shard.submit(submission("b", max_tokens=20))
        await until(lambda: len(shard.executor.plans) >= 3)
        shard.engine.disconnect("gone")
        shard.engine.submit("gone", submission("c"))    # the same router, back again
        num_plans = len(shard.executor.plans)
        await until(lambda: shard.has_ended("b") and shard.has_ended("c"))
        assert not shard.has_ended("a")
        for plan in shard.executor.plans[num_plans + 1:]:
            assert "a" not in {each.request_id for each in plan.requests}
        assert shard.engine.load().num_running == 0
        check_blocks(shard.scheduler.blocks, [])


async def test_a_held_router_waits_and_goes_on() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.engine.hold("r", True)
        shard.submit(submission("a"))
        agreements = cluster.group.num_agreements
        await turns(50)
        assert cluster.group.num_agreements == agreements
        shard.engine.hold("r", False)
        await cluster.until_ended()
        cluster.check()


async def test_a_passed_deadline_fails_the_request() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.executor.in_flight = asyncio.Event()
        shard.submit(submission("a", deadline_s=5.0))
        await until(lambda: len(shard.executor.plans) == 1)
        cluster.clock.now_s = 5.0
        shard.executor.in_flight.set()
        await cluster.until_ended()
        assert shard.check("a") is FinishReason.FAILED and shard.events("a")[-1].error


def with_grammar(name: str, **fields: object) -> Submission:
    plain = submission(name, **fields)      # type: ignore[arg-type]
    return replace(plain, sampling=replace(plain.sampling, grammar="of llguidance"))


async def test_others_go_on_while_a_grammar_is_prepared() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.submit(with_grammar("a"))
        shard.submit(submission("b"))
        await until(lambda: shard.has_ended("b"))
        agreements = cluster.group.num_agreements
        await turns(50)
        assert cluster.group.num_agreements == agreements and not shard.events("a")
        shard.executor.preparing["a"].set_result(None)
        await cluster.until_ended()
        cluster.check()


async def test_a_grammar_that_cannot_be_prepared_fails_its_request_only() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.submit(with_grammar("a"))
        shard.submit(submission("b"))
        await until(lambda: "a" in shard.executor.preparing)
        shard.executor.preparing["a"].set_exception(GrammarError("too large"))
        await cluster.until_ended()
        assert [(event.finish_reason, event.error) for event in shard.events("a")] == [
            (FinishReason.FAILED, "too large")]
        assert shard.check("b") is FinishReason.LENGTH


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
async def test_a_request_can_end_while_its_grammar_is_prepared(way: str) -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.submit(with_grammar("a", deadline_s=5.0))
        await until(lambda: "a" in shard.executor.preparing)
        preparing = shard.executor.preparing.pop("a")
        if way == "cancel":
            shard.engine.cancel("r", "a")
        elif way == "disconnect":
            shard.engine.disconnect("r")
        else:
            cluster.clock.now_s = 5.0
            shard.engine.tell_prepared()
        await until(preparing.cancelled)
        shard.engine.submit("r", with_grammar("a", max_tokens=3))       # the id is free again
        await until(lambda: "a" in shard.executor.preparing)
        shard.executor.preparing["a"].set_result(None)
        await until(lambda: sum(len(event.token_ids) for event in shard.events("a")) == 3)
        assert shard.engine.load().num_sequences == 0


async def test_a_deadline_wakes_a_sleeping_shard() -> None:
    cluster = Cluster()
    shard, = cluster.shards
    loop = asyncio.get_running_loop()
    engine = Engine(shard.scheduler, shard.executor, 1, loop.time, shard._ring_peers, shard._deliver)
    ended = asyncio.Event()
    engine._deliver_to_router = lambda router_id, step_index, events: ended.set()
    task = asyncio.create_task(engine.run())
    engine.hold("r", True)
    engine.submit("r", submission("a", deadline_s=loop.time() + 0.01))
    await ended.wait()
    await engine.stop()
    await task


async def test_a_complete_journal_ends_without_a_step() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.submit(submission("a", journal_token_ids=expected(submission("a")).token_ids))
        await cluster.until_ended()
        assert shard.check("a") is FinishReason.LENGTH and not shard.executor.plans


async def test_other_tasks_run_between_steps() -> None:
    """The fake executor answers in the next turn of the loop."""
    async with Cluster() as cluster:
        shard, = cluster.shards
        shard.submit(submission("a", max_tokens=200))
        for _ in range(10):
            num_plans = len(shard.executor.plans)
            await turns(3)
            assert len(shard.executor.plans) - num_plans <= 3
        shard.engine.cancel("r", "a")


def test_speed_is_measured_over_recent_work() -> None:
    rate = WorkRate()
    assert (rate.tokens_per_s, rate.step_s) == (0.0, 0.0)
    for _ in range(100):
        rate.add(num_tokens=10, step_s=1.0)
    assert (rate.tokens_per_s, rate.step_s) == (10.0, 1.0)
    for _ in range(int(RATE_WINDOW_S / 0.5)):
        rate.add(num_tokens=10, step_s=0.5)
    assert (rate.tokens_per_s, rate.step_s) == (20.0, 0.5)


async def test_load_says_what_is_used_and_how_fast() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        assert shard.engine.load() == ShardLoad(kv_blocks_free=64, kv_blocks_total=64)
        shard.model = shard.executor.model = SlowModel(cluster.clock)
        shard.submit(submission("a", num_prompt=5, max_tokens=4))
        await cluster.until_ended()
        assert (shard.engine.num_steps, shard.engine.num_tokens_computed) == (4, 8)
        assert (shard.engine.load().tokens_per_s, shard.engine.load().step_s) == (4.0, 0.5)


# The group.


async def test_an_idle_group_agrees_on_nothing() -> None:
    async with Cluster(3) as cluster:
        assert cluster.group.num_agreements == 3        # the barrier at the epoch's beginning
        await turns(300)
        assert cluster.group.num_agreements == 3
        cluster.shards[1].submit(submission("a"))
        await cluster.until_ended()
        await cluster.until_asleep()
        assert cluster.group.num_agreements == 3 * (1 + 4 + 1)
        await turns(300)
        assert cluster.group.num_agreements == 3 * (1 + 4 + 1)
        assert [shard.num_rings for shard in cluster.shards] == [0, 1, 0]
        assert [len(shard.executor.plans) for shard in cluster.shards] == [4, 4, 4]


async def test_late_and_foreign_rings_wake_nobody() -> None:
    async with Cluster(2) as cluster:
        agreements = cluster.group.num_agreements
        cluster.shards[0].engine.ring(epoch_number=1, step_index=0)
        cluster.shards[0].engine.ring(epoch_number=2, step_index=5)
        cluster.shards[0].engine.ring(epoch_number=0, step_index=5)
        await turns(100)
        assert cluster.group.num_agreements == agreements


async def test_a_ring_that_fails_is_left_to_the_agreement() -> None:
    async with Cluster(2) as cluster:
        ringer, peer = cluster.shards

        async def fail(step_index: int) -> None:
            raise ConnectionError("no route")

        ringer.engine._ring_peers = fail
        ringer.submit(submission("a"))
        await turns(100)
        assert not ringer.has_ended("a")
        peer.engine.ring(1, 1)
        await cluster.until_ended()
        ringer.engine._ring_peers = ringer._ring_peers      # the group sleeps, and is to end in order


# Revisions of the placement.


async def steps(cluster: Cluster, number: int) -> None:
    """Until every member has made so many more."""
    target = cluster.group.num_steps + number * cluster.group.num_members
    await until(lambda: cluster.group.num_steps >= target)


async def test_all_members_switch_before_the_same_step_when_the_last_has_prepared() -> None:
    async with Cluster(3, max_delay=4) as cluster:
        cluster.shards[0].submit(submission("a", max_tokens=40))
        cluster.shards[2].submit(submission("b", max_tokens=40))
        for shard in cluster.shards:
            await steps(cluster, 3)
            assert not cluster.switches()
            shard.prepare(1)
        told_index = len(cluster.shards[2].executor.plans)
        await cluster.until_ended()
        [(revision, step_index)] = cluster.switches()
        assert revision == 1 and told_index <= step_index <= told_index + 2
        cluster.check()


async def test_an_idle_group_switches_and_sleeps_on() -> None:
    async with Cluster(3) as cluster:
        for shard in cluster.shards:
            assert not cluster.switches()
            shard.prepare(1)
            await cluster.until_asleep()
        assert cluster.switches() == [(1, 3)]
        assert cluster.group.num_agreements == 3 * (1 + 3) and cluster.group.num_steps == 0
        for shard in cluster.shards:        # all at once: one agreement, or a few
            shard.prepare(2)
        await cluster.until_asleep()
        assert cluster.switches()[1:] in ([(2, 4)], [(2, 5)], [(2, 6)])
        agreements = cluster.group.num_agreements
        await turns(200)
        assert cluster.group.num_agreements == agreements


async def test_a_member_alone_switches_by_itself() -> None:
    async with Cluster(1) as cluster:
        cluster.shards[0].prepare(1)
        await cluster.until_asleep()
        assert cluster.switches() == [(1, 1)]


@pytest.mark.parametrize("late", range(3))
async def test_nobody_switches_while_members_have_prepared_different_revisions(late: int) -> None:
    """Revision 1 was taken back, since one could not prepare it, and `late` hears of that last."""
    async with Cluster(3) as cluster:
        slow, able, unable = (cluster.shards[(late + i) % 3] for i in range(3))
        slow.prepare(1)
        able.prepare(1)
        await cluster.until_asleep()
        able.prepare(0)
        unable.prepare(2)
        able.prepare(2)
        await cluster.until_asleep()
        assert not cluster.switches()
        slow.prepare(2)
        await cluster.until_asleep()
        assert [revision for revision, _ in cluster.switches()] == [2]


async def test_a_new_epoch_begins_with_what_its_members_have_loaded() -> None:
    cluster = Cluster(2)
    cluster.group = Group(2, epoch_number=2)
    for shard in cluster.shards:
        shard.executor = FakeExecutor(cluster.group, shard.rank, shard.model)
        shard.executor.prepared_revision = shard.executor.running_revision = 5
        shard.engine.change_epoch(2, shard.executor, shard._ring_peers)
    async with cluster:
        assert [shard.engine.revision for shard in cluster.shards] == [5, 5]
        assert cluster.group.num_agreements == 2 and not cluster.shards[0].executor.switches


async def test_only_one_run_at_a_time_and_no_epoch_change_within() -> None:
    async with Cluster() as cluster:
        shard, = cluster.shards
        with pytest.raises(RuntimeError, match="one run"):
            await shard.engine.run()
        with pytest.raises(RuntimeError, match="stop"):
            shard.engine.change_epoch(2, shard.executor, shard._ring_peers)


async def client(cluster: Cluster, rng: random.Random, number: int) -> None:
    """A router at work: submits to any member at any moment, sometimes cancels or holds back."""
    for i in range(rng.randint(1, 4)):
        await turns(rng.choice([0, 1, 2, 5, 40, 150]))
        shard = rng.choice(cluster.shards)
        name = f"{number}.{i}"
        shard.submit(submission(name, num_prompt=rng.randint(1, 20), max_tokens=rng.randint(1, 6)), f"router{number}")
        match rng.randint(0, 5):
            case 0:
                await turns(rng.randint(0, 30))
                shard.engine.cancel("r", name)
            case 1:
                shard.engine.hold(f"router{number}", True)
                await turns(rng.randint(0, 60))
                shard.engine.hold(f"router{number}", False)


async def preparer(shard: Shard, rng: random.Random) -> None:
    await turns(rng.choice([0, 1, 10, 100, 300]))
    shard.prepare(1)


@pytest.mark.parametrize("block_of_seeds", range(4))
async def test_no_order_of_events_loses_a_wake_up(block_of_seeds: int) -> None:
    for seed in range(block_of_seeds * 50, block_of_seeds * 50 + 50):
        rng = random.Random(seed)
        cluster = Cluster(rng.randint(2, 4), rng.choice([8, 12, 64]), seed, max_delay=rng.choice([0, 1, 4, 12]))
        async with cluster:
            workers: list[Awaitable[None]] = [client(cluster, rng, number) for number in range(rng.randint(1, 3))]
            preparers = list(cluster.shards) if rng.random() < 0.5 else cluster.shards[1:]
            workers += [preparer(shard, rng) for shard in preparers]
            await asyncio.gather(*workers)
            await cluster.until_ended()
            cluster.check()
            await cluster.until_asleep()
            agreements = cluster.group.num_agreements
            await turns(100)
            assert cluster.group.num_agreements == agreements
            assert [revision for revision, _ in cluster.switches()] == [1] * (len(preparers) == len(cluster.shards))


# Epochs.


@pytest.mark.parametrize("moment", ["agree", "execute"])
@pytest.mark.parametrize("step_index", [0, 1, 2, 4])
async def test_a_broken_group_keeps_its_requests_and_the_next_epoch_draws_the_same_tokens(
        moment: str, step_index: int) -> None:
    cluster = Cluster(3, num_blocks=12)
    cluster.group.fail_at = (moment, step_index)
    for shard in cluster.shards[:2]:
        for name in "ab":
            shard.submit(submission(name, num_prompt=9, max_tokens=9))
    cluster.start()
    for ended in await asyncio.gather(*cluster.tasks, return_exceptions=True):
        assert isinstance(ended, GroupError)
    cluster.shards[1].submit(submission("between", max_tokens=3))
    cluster.shards[0].engine.cancel("r", "b")
    cluster.group = Group(3, epoch_number=2)
    for shard in cluster.shards:
        shard.executor = FakeExecutor(cluster.group, shard.rank, shard.model)
        shard.engine.change_epoch(2, shard.executor, shard._ring_peers)
    async with cluster:
        await cluster.until_ended()
    cluster.check()
    assert cluster.shards[0].check("b") is FinishReason.CANCELLED
    assert cluster.shards[0].check("a") is cluster.shards[1].check("between") is FinishReason.LENGTH
