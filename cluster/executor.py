"""Runs a shard's steps: Runner and ProcessGroup on the one thread that touches tensors."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from cluster.process_group import ProcessGroup
from model.runner import Runner
from model.step import StepHeader, StepPlan, StepResult


class GroupExecutor:
    """See serving.engine.Executor. `thread` also loaded the weights and joined the group."""

    def __init__(self, runner: Runner, group: ProcessGroup, thread: ThreadPoolExecutor) -> None:
        self._runner = runner
        self._group = group
        self._thread = thread

    async def agree(self, header: StepHeader) -> tuple[StepHeader, ...]:
        if self._group.num_members == 1:
            return (header,)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._group.agree, header)

    async def execute(self, plan: StepPlan, num_tokens_of_member: tuple[int, ...]) -> StepResult:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._runner.execute, plan, num_tokens_of_member)
