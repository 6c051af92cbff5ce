"""Runs a shard's steps: Runner and ProcessGroup on the one thread that touches tensors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.shard.loaded_model import LoadedModel
from cluster.shard.process_group import ProcessGroup
from cluster.shard.work_meter import WorkMeter
from model.dispatch.dispatcher import Dispatcher
from model.errors import GrammarError
from model.kernels.protocol import ExpertWeights
from model.runner import Runner
from model.step import StepHeader, StepPlan, StepResult, StepStats
from serving.engine.agreement import Agreement
from serving.engine.expert_load import ExpertLoadCounter
from serving.engine.request import Submission
from serving.link.epoch import Epoch


@dataclass(frozen=True, slots=True)
class PreparedRevision:
    """Holds all that a member needs to go on with another placement of its epoch."""

    epoch: Epoch
    model: LoadedModel          # as it will be
    dispatcher: Dispatcher
    weights_of_layer: dict[int, ExpertWeights]


@dataclass(frozen=True, slots=True)
class StepCounters:
    """Counts a member's steps, over all its epochs and placements."""

    loads: ExpertLoadCounter
    work: WorkMeter

    def add(self, plan: StepPlan, stats: StepStats, now_s: float) -> None:
        self.loads.add(stats.expert_rows, now_s)
        self.work.add(plan, stats, now_s)


class GroupExecutor:
    """Runs and counts steps, as serving.engine.Executor asks. `thread` also loaded the weights and joined the group.

    on_switch(prepared, the weights it replaced by layer) is called when a switch is done.
    """

    def __init__(self, runner: Runner, group: ProcessGroup, thread: ThreadPoolExecutor, epoch: Epoch,
                 counters: StepCounters,
                 on_switch: Callable[[PreparedRevision, dict[int, ExpertWeights]], None]) -> None:
        self._runner = runner
        self._group = group
        self._thread = thread
        self._revision = epoch.revision
        self._counters = counters
        self._on_switch = on_switch
        self._prepared: PreparedRevision | None = None
        self._is_unwanted = False           # what is prepared: agreements do not offer it any more
        self._is_switching = False
        self._settled = asyncio.Event()     # neither an agreement nor a switch is under way
        self._settled.set()
        counters.loads.use(epoch.placement, group.rank)

    async def prepare(self, submission: Submission) -> None:
        grammars = self._runner.grammars
        if grammars is None:
            raise GrammarError("the model's tokenizer cannot be used for output formats",
                               fix="ask for free text; the shard's log says why")
        await asyncio.wrap_future(grammars.prepare(submission.request_id, submission.sampling.grammar,
                                                   submission.journal_token_ids))

    @property
    def prepared_revision(self) -> int:
        prepared = None if self._is_unwanted else self._prepared
        return self._revision if prepared is None else prepared.epoch.revision

    def offer(self, prepared: PreparedRevision) -> None:
        """Let switch() take it from now on. Nothing else may be on offer."""
        assert self._prepared is None, "withdraw what is on offer first"
        self._prepared = prepared

    async def withdraw(self) -> None:
        """Drop what is on offer, unless the agreement under way, where this member has offered it, takes it."""
        self._is_unwanted = True
        # Once is enough: steps may follow each other so closely that it is never found settled, but those do not offer
        # it. The end of the agreement under way may be the beginning of a switch.
        await self._settled.wait()
        while self._is_switching:
            await self._settled.wait()
        self._prepared, self._is_unwanted = None, False

    async def agree(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        if self._group.num_members == 1:
            agreement = Agreement((header,))
            at_once = agreement.is_step_at_once(self._revision)
            return agreement, await self.execute(plan, agreement) if at_once else None
        self._settled.clear()
        try:
            agreement, result = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._agree_and_execute, header, plan)
        finally:
            self._settled.set()     # who waits for it runs after the engine, which may go on with switch() at once
        if result is not None:
            self._counters.add(plan, result.stats, time.monotonic())
        return agreement, result

    def _agree_and_execute(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        agreement = Agreement(self._group.agree(header))
        if not agreement.is_step_at_once(self._revision):
            return agreement, None
        return agreement, self._runner.execute(plan, agreement.num_tokens_of_member)

    async def switch(self, revision: int) -> None:
        prepared = self._prepared
        assert prepared is not None and prepared.epoch.revision == revision, "only what was offered in the agreement"
        self._settled.clear()
        self._is_switching = True
        try:
            self._prepared, self._revision = None, revision
            replaced = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._runner.switch, prepared.dispatcher, prepared.weights_of_layer)
            self._counters.loads.use(prepared.epoch.placement, self._group.rank)
            self._on_switch(prepared, replaced)
        finally:
            self._is_switching = False
            self._settled.set()

    async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
        result = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._runner.execute, plan, agreement.num_tokens_of_member)
        self._counters.add(plan, result.stats, time.monotonic())
        return result
