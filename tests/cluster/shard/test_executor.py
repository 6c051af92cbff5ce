"""A revision is on offer for a switch, while agreements and switches are under way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
from llguidance import LLMatcher

from cluster.shard.executor import GroupExecutor, PreparedRevision, StepCounters
from cluster.shard.loaded_model import LoadedModel
from cluster.shard.process_group import ProcessGroup
from cluster.shard.work_meter import MIN_STEPS, WorkMeter
from model.dispatch.dispatcher import Dispatcher
from model.errors import GrammarError
from model.grammar import GrammarMasks, GrammarTokenizer
from model.kernels.protocol import ExpertWeights
from model.placement import Placement
from model.runner import Runner
from model.step import SamplingSpec, StepHeader, StepPlan, StepResult, StepStats, StepWork
from serving.engine.agreement import Agreement
from serving.engine.expert_load import ExpertLoadCounter
from serving.engine.request import Submission
from serving.link.epoch import Epoch
from tests.cluster.planner.planned_members import model_args
from tests.cluster.profiles import PROFILE
from tests.deadlines import PATIENCE_S
from tests.serving.conftest import byte_level_tokenizer

BEFORE, AFTER = Placement(2, (((0,), (1,)),)), Placement(2, (((1,), (0,)),))
BOTH = Agreement((StepHeader(1, 0, 1),) * 2)


@dataclass
class HeldGroup:
    """An agreement ends when the test says so. The other member always has the same header."""

    num_members: int = 2
    rank: int = 0
    may_end: threading.Event = field(default_factory=threading.Event)

    def agree(self, header: StepHeader) -> tuple[StepHeader, ...]:
        assert self.may_end.wait(PATIENCE_S)
        return (header,) * self.num_members


@dataclass
class RecordingRunner:
    grammars: GrammarMasks | None = None
    switched: list[dict[int, ExpertWeights]] = field(default_factory=list)
    executed: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)       # (step, everybody's tokens)

    def switch(self, dispatcher: Dispatcher, weights_of_layer: dict[int, ExpertWeights]) -> dict[int, ExpertWeights]:
        self.switched.append(weights_of_layer)
        return {}

    def execute(self, plan: StepPlan, num_tokens_of_member: tuple[int, ...]) -> StepResult:
        self.executed.append((plan.step_index, num_tokens_of_member))
        work = StepWork((0.0, 0.0), (5e-5,), (2e-4,))
        return StepResult(plan.epoch_number, plan.step_index, (), StepStats(expert_rows=((5,),), work=work))


class Case:
    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.group, self.runner = HeldGroup(), RecordingRunner()
        self.loads = ExpertLoadCounter(1, 2, 1e9, 0.0)
        self.work = WorkMeter(PROFILE, model_args(num_layers=1), 1e9, 0.0)
        self.done: list[int] = []
        self.executor = GroupExecutor(cast(Runner, self.runner), cast(ProcessGroup, self.group), thread,
                                      Epoch(1, (), BEFORE, "", ()), StepCounters(self.loads, self.work),
                                      lambda prepared, replaced: self.done.append(prepared.epoch.revision))

    def offer(self, revision: int) -> None:
        epoch = Epoch(1, (), AFTER, "", (), revision=revision)
        self.executor.offer(PreparedRevision(epoch, cast(LoadedModel, None), cast(Dispatcher, None), {}))

    async def step(self, step_index: int) -> None:
        """As the engine does: an agreement, and a switch without a turn of the loop between."""
        revision = self.executor.prepared_revision
        agreement, result = await self.executor.agree(StepHeader(1, step_index, 0, prepared_revision=revision),
                                                      StepPlan(1, step_index, ()))
        assert result is None
        if agreement.revision_after(len(self.done)) > len(self.done):
            await self.executor.switch(revision)


@pytest.fixture
def case() -> Iterator[Case]:
    thread = ThreadPoolExecutor(1)
    yield Case(thread)
    thread.shutdown()


async def test_what_is_withdrawn_is_not_told(case: Case) -> None:
    case.offer(1)
    assert case.executor.prepared_revision == 1
    await case.executor.withdraw()
    assert case.executor.prepared_revision == 0
    case.group.may_end.set()
    await case.step(0)
    assert not case.done and not case.runner.switched


async def test_withdrawing_waits_for_the_agreement_and_the_switch_that_follows(case: Case) -> None:
    case.offer(1)
    step = asyncio.create_task(case.step(0))
    await asyncio.sleep(0)
    withdrawal = asyncio.create_task(case.executor.withdraw())
    await asyncio.sleep(0)
    assert not withdrawal.done()
    case.group.may_end.set()
    await withdrawal
    assert case.done == [1] and len(case.runner.switched) == 1 and case.executor.prepared_revision == 1
    await step


async def test_withdrawing_ends_while_steps_follow_each_other_without_a_pause(case: Case) -> None:
    case.group.may_end.set()
    withdrawal: asyncio.Task[None] | None = None

    async def run_steps() -> int:
        for step_index in range(200):
            await case.step(step_index)
            if withdrawal is not None and withdrawal.done():
                return step_index
        return 200
    steps = asyncio.create_task(run_steps())
    await asyncio.sleep(0)
    withdrawal = asyncio.create_task(case.executor.withdraw())
    assert await steps < 200 and withdrawal.done()


async def test_an_offer_made_during_an_agreement_is_withdrawn_after_it(case: Case) -> None:
    step = asyncio.create_task(case.step(0))
    await asyncio.sleep(0)
    case.offer(1)
    withdrawal = asyncio.create_task(case.executor.withdraw())
    await asyncio.sleep(0)
    case.group.may_end.set()
    await withdrawal
    await step
    assert not case.done and case.executor.prepared_revision == 0
    case.offer(2)
    assert case.executor.prepared_revision == 2


async def test_rows_are_counted_under_the_placement_of_the_step(case: Case) -> None:
    case.group.may_end.set()
    await case.executor.execute(StepPlan(1, 0, ()), BOTH)
    case.offer(1)
    await case.step(1)
    for _ in range(2):
        await case.executor.execute(StepPlan(1, 1, ()), BOTH)
    rows = case.loads.snapshot(0.0).rows()
    assert rows[0, 1] == pytest.approx(2 * rows[0, 0], rel=1e-3)


async def test_the_work_is_metered_over_a_change_of_placement(case: Case) -> None:
    case.group.may_end.set()
    for step_index in range(int(MIN_STEPS) + 5):
        if step_index == 10:
            case.offer(1)
            await case.step(step_index)
        await case.executor.execute(StepPlan(1, step_index, ()), BOTH)
    ratio = case.work.snapshot(time.monotonic())
    assert ratio is not None and ratio.num_steps == MIN_STEPS + 5
    expected_s = 4e-5 + 4 * (3e-4 - 4e-5) / 63
    assert ratio.own is None and ratio.experts == pytest.approx(2e-4 / expected_s)
    assert ratio.planning_s == pytest.approx(5e-5)


@pytest.mark.parametrize("num_members", [1, 2])
async def test_an_agreed_step_is_made_in_one_go_and_counted_once(case: Case, num_members: int) -> None:
    case.group.num_members = num_members
    case.group.may_end.set()
    agreement, result = await case.executor.agree(StepHeader(1, 7, 3), StepPlan(1, 7, ()))
    assert agreement.num_tokens_of_member == (3,) * num_members and result is not None and result.step_index == 7
    assert case.runner.executed == [(7, (3,) * num_members)]
    assert case.loads.num_steps == 1


@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize("header", [
    StepHeader(1, 7, 0), StepHeader(1, 7, 3, prepared_revision=1)], ids=str)
async def test_nothing_runs_before_a_sleep_or_a_switch(case: Case, num_members: int,
                                                               header: StepHeader) -> None:
    case.group.num_members = num_members
    case.group.may_end.set()
    case.offer(1)
    agreement, result = await case.executor.agree(header, StepPlan(1, 7, ()))
    assert agreement.headers == (header,) * num_members and result is None
    assert not case.runner.executed and not case.runner.switched


async def test_grammars_are_prepared_while_the_model_thread_is_busy(case: Case) -> None:
    agreeing = asyncio.create_task(case.executor.agree(StepHeader(1, 0, 1), StepPlan(1, 0, ())))
    grammar = str(LLMatcher.grammar_from_regex("[a-z]+"))
    submission = Submission("a", (1,), SamplingSpec(grammar=grammar), 4)
    with pytest.raises(GrammarError, match="tokenizer"):
        await case.executor.prepare(submission)
    case.runner.grammars = GrammarMasks(GrammarTokenizer(byte_level_tokenizer().to_str(), (2,)), 512)
    await case.executor.prepare(submission)
    with pytest.raises(GrammarError, match="compiled"):
        await case.executor.prepare(replace(submission, sampling=SamplingSpec(grammar="start: missing")))
    assert not agreeing.done()
    case.group.may_end.set()
    await agreeing
