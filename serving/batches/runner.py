"""Computes lines of batches while a router has room: takes them, has them answered, writes what comes of it.

All that matters is in the database, so a router that ends in the middle leaves nothing that another cannot go on with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from serving.batches.batch import Batch, BatchFault, Line, counts_as_try, retry_after_s
from serving.batches.line_store import LineAnswer, Place
from serving.batches.stores import BatchStores
from serving.batches.validation import LineHead, validate
from serving.errors import InvalidRequestError, NotReadyError, ServingError
from serving.metrics import BatchMetrics

T = TypeVar("T")
logger = logging.getLogger(__name__)

POLL_S = 1.0            # between looks for something to do


class LineWork(Protocol):
    """What is done with a line: the doors' part of it."""

    def check(self, content: bytes, endpoint: str) -> LineHead:
        """Return what the line says beside its request's body. Raises InvalidRequestError."""

    async def answer(self, line: Line, content: bytes) -> LineAnswer:
        """Return the answer. Raises ServingError."""

    def refusal(self, line: Line, error: Exception) -> LineAnswer:
        """Return what is written of a line that an error has ended."""


class BatchRunner:
    """`run` it. One a router."""

    def __init__(self, stores: BatchStores, work: LineWork, has_room: Callable[[], bool], clock: Callable[[], float],
                 metrics: BatchMetrics) -> None:
        """`has_room` tells whether nobody who matters more waits; `clock` is Unix time."""
        self._stores = stores
        self._work = work
        self._has_room = has_room
        self._clock = clock
        self._metrics = metrics
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        self._validation: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_silent = False         # the database, and that was logged

    async def run(self) -> None:
        """Compute lines until cancelled; those that are not done then are given back."""
        try:
            while True:
                self._wake.clear()
                await self._turn()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._wake.wait()
        finally:
            await self._stop()

    async def _turn(self) -> None:
        try:
            await self._leave_unwanted()
            await self._advance()
            await self._take()
            await self._validate()
            self._is_silent = False
        except Exception as error:      # a fault in batches must not end the router that answers others
            if not self._is_silent:
                is_known = isinstance(error, NotReadyError)
                logger.warning("batches_wait why=%s", error, exc_info=None if is_known else error)
            self._is_silent = True

    async def _take(self) -> None:
        num_free = self._stores.config.max_concurrent - len(self._tasks)
        if num_free <= 0 or not self._has_room():
            return
        held, now_s = list(self._tasks), self._clock()
        for line in await self._stores.thread.call(lambda: self._stores.lines.take(held, num_free, now_s)):
            self._tasks[line.place] = asyncio.create_task(self._compute(line))
            self._tasks[line.place].add_done_callback(partial(self._ended, line.place))
        self._metrics.num_running.set(len(self._tasks))

    def _ended(self, place: Place, _: asyncio.Task[None]) -> None:
        del self._tasks[place]
        self._metrics.num_running.set(len(self._tasks))
        self._wake.set()

    async def _leave_unwanted(self) -> None:
        """Stop computing lines of batches that are cancelled or have expired."""
        batch_ids, now_s = {batch_id for batch_id, _ in self._tasks}, self._clock()
        if not batch_ids:
            return
        unwanted = await self._stores.thread.call(lambda: self._stores.lines.not_wanted(batch_ids, now_s))
        leaving = {place: task for place, task in self._tasks.items() if place[0] in unwanted}
        for task in leaving.values():
            task.cancel()
        if leaving:
            await asyncio.wait(leaving.values())
            await self._stores.thread.call(lambda: self._stores.lines.free(leaving))

    async def _advance(self) -> None:
        batches = self._stores.batches
        for batch_id in await self._stores.thread.call(lambda: batches.due(self._clock())):
            while await self._stores.thread.call(partial(batches.advance, batch_id, self._clock())):
                pass        # others have their turn on the thread

    async def _validate(self) -> None:
        if self._validation is not None and not self._validation.done():
            return
        batch = await self._stores.thread.call(
            lambda: self._stores.batches.take_for_validation(self._stores.router_id, self._clock()))
        if batch is not None:
            self._validation = asyncio.create_task(self._validated(batch))

    async def _validated(self, batch: Batch) -> None:
        try:
            await validate(self._stores, batch, self._work.check, self._clock)
        except NotReadyError as error:      # it will be begun anew
            logger.warning("batch_unvalidated batch_id=%s why=%s", batch.batch_id, error.message)
        except Exception as error:
            logger.error("batch_unvalidated batch_id=%s", batch.batch_id, exc_info=error)
            fault = BatchFault("internal_error", f"internal error; report {batch.batch_id}")
            await self._until_written(lambda: self._stores.batches.validated(
                batch.batch_id, self._stores.router_id, None, [fault], self._clock()))
        self._wake.set()

    async def _compute(self, line: Line) -> None:
        """Have a line answered and written, or give it back. Ends without an error."""
        try:
            content = await self._stores.thread.call(lambda: self._stores.lines.read(line))
            answer = await self._work.answer(line, content)
        except ServingError as error:
            after_s = retry_after_s(error, line.num_tries)
            if after_s is not None:
                await self._give_back(line, counts_as_try(error), after_s)
                return
            answer = self._work.refusal(line, error)
        except Exception as error:          # a fault of ours in one line is its answer
            answer = self._work.refusal(line, error)
        await self._finish(line, answer)

    async def _give_back(self, line: Line, is_try: bool, after_s: float) -> None:
        self._metrics.lines.labels("retried").inc()
        logger.info("batch_line_retried batch_id=%s line=%d after_s=%.1f", *line.place, after_s)
        await self._until_written(lambda: self._stores.lines.give_back(line, is_try, self._clock() + after_s))

    async def _finish(self, line: Line, answer: LineAnswer) -> None:
        def finish() -> bool:
            try:
                return self._stores.lines.finish(line, answer)
            except InvalidRequestError as error:
                return self._stores.lines.finish(line, self._work.refusal(line, error))
        if await self._until_written(finish):
            self._metrics.lines.labels("failed" if answer.is_error else "completed").inc()

    async def _until_written(self, write: Callable[[], T]) -> T:
        """Return what `write` does, once the database takes it."""
        while True:
            try:
                return await self._stores.thread.call(write)
            except NotReadyError:
                await asyncio.sleep(POLL_S)

    async def _stop(self) -> None:
        """Cancel what runs, and let others take it at once."""
        tasks, held = [*self._tasks.values()], list(self._tasks)
        tasks += [self._validation] if self._validation is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if held:
                await self._stores.thread.call(lambda: self._stores.lines.free(held))
        except NotReadyError as error:      # others take them when this router does not beat any more
            logger.warning("batch_lines_kept num=%d why=%s", len(held), error.message)
