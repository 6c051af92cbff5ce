"""Counts requests: each waits here for its entry in the ledger, and tells its end. The ledger is another thread's work.

What comes while the thread is busy goes into the book together. Without the database nothing is admitted, for nobody
would count it; ends are kept until it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from serving.errors import InvalidRequestError, NotReadyError, OverloadedError, QuotaExceededError
from serving.tenants.database import reason_of
from serving.tenants.key import Key
from serving.tenants.ledger import NOTHING_USED, Ending, Ledger, Opened, Opening, Outcome, Used
from serving.tenants.rate_headers import rate_headers
from serving.tenants.standing import Grant, Refusal, Standing

T = TypeVar("T")
logger = logging.getLogger(__name__)

BEAT_S = 2.0            # how often a router says that it lives, and what its requests have used
LOST_EVERY = 5          # beats between looks for routers that are gone
OPEN_TIMEOUT_S = 10.0
_BUDGETS = ("tokens_per_day", "tokens_per_month")


@dataclass(slots=True)
class _Waiting:
    opening: Opening
    answer: asyncio.Future[Opened]


class Meter:
    """Runs on one event loop. `run` it, or nothing is admitted."""

    def __init__(self, ledger: Ledger, thread: Executor, clock: Callable[[], float]) -> None:
        """`clock` is Unix time."""
        self._ledger = ledger
        self._thread = thread
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._endings: dict[str, Ending] = {}               # by usage id
        self._used: dict[str, Used] = {}                    # of open requests
        self._standings: dict[str, Standing] = {}           # of keys, as last seen
        self._has_work = asyncio.Event()
        self._is_silent = False                             # the database, and that was logged

    async def open(self, opening: Opening) -> Grant:
        """Wait until the request is in the book. It must be ended.

        Raises OverloadedError or QuotaExceededError when the key's limits are reached, InvalidRequestError when they
        never allow it, NotReadyError when the database does not answer.
        """
        waiting = _Waiting(opening, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._has_work.set()
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                opened = await waiting.answer
        except BaseException as error:
            if waiting.answer.done() and not waiting.answer.cancelled() and waiting.answer.exception() is None:
                self._cancel(opening)       # written in the very moment in which its client went
            if isinstance(error, TimeoutError):
                raise _silent() from None
            raise
        if isinstance(opened.decision, Refusal):
            raise refusal_error(opened.decision, opening.key)
        self._used[opening.usage_id] = NOTHING_USED
        return opened.decision

    def progress(self, usage_id: str, used: Used) -> None:
        """Note what an open request has used so far."""
        self._used[usage_id] = used

    def end(self, usage_id: str, key: Key, outcome: Outcome, used: Used) -> None:
        """End a request. The book learns of it soon."""
        del self._used[usage_id]
        self._endings[usage_id] = Ending(usage_id, key.key_id, outcome, used, self._clock())
        self._has_work.set()

    def headers(self, key: Key) -> dict[str, str]:
        """Return what is left of the key's rates, by what was known when it last asked here."""
        standing = self._standings.get(key.key_id)
        return {} if standing is None else rate_headers(standing, key.limits, self._clock())

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        num_beats, next_beat_s = 0, 0.0
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() >= next_beat_s:
                await self._beat(looks_for_lost=num_beats % LOST_EVERY == 0)
                num_beats, next_beat_s = num_beats + 1, loop.time() + BEAT_S
            try:
                async with asyncio.timeout(max(0.0, next_beat_s - loop.time())):
                    await self._has_work.wait()
            except TimeoutError:
                continue
            if not await self.write():
                await asyncio.sleep(1.0)

    async def write(self) -> bool:
        """Write all that is pending. Return whether the database took it."""
        self._has_work.clear()
        waiting, self._waiting = [one for one in self._waiting if not one.answer.done()], []
        endings = list(self._endings.values())
        try:
            opened = await self._call(lambda: self._ledger.write([one.opening for one in waiting], endings))
        except SQLAlchemyError as error:
            self._unwritten(waiting, error)
            return False
        self._is_silent = False
        for ending in endings:
            self._endings.pop(ending.usage_id, None)
        for one, found in zip(waiting, opened, strict=True):
            self._standings[one.opening.key.key_id] = found.standing
            if not one.answer.done():
                one.answer.set_result(found)
            elif isinstance(found.decision, Grant):     # its client has gone meanwhile
                self._cancel(one.opening)
        return True

    def _unwritten(self, waiting: list[_Waiting], error: SQLAlchemyError) -> None:
        """Refuse who waits. A commit may have come through without its answer, so their ends are written too."""
        if not self._is_silent:
            logger.warning("ledger_unwritten num_waiting=%d num_endings=%d why=%s", len(waiting), len(self._endings),
                           reason_of(error))
        self._is_silent = True
        for one in waiting:
            self._cancel(one.opening)
            if not one.answer.done():
                one.answer.set_exception(_silent())

    def _cancel(self, opening: Opening) -> None:
        self._endings[opening.usage_id] = Ending(opening.usage_id, opening.key.key_id, Outcome.CANCELLED, NOTHING_USED,
                                                 self._clock())
        self._has_work.set()

    async def _beat(self, looks_for_lost: bool) -> None:
        now_s, progress = self._clock(), [(usage_id, used) for usage_id, used in self._used.items()
                                          if used is not NOTHING_USED]

        def beat() -> int:
            self._ledger.beat(now_s, progress)
            return self._ledger.end_lost(now_s) if looks_for_lost else 0
        try:
            if num_lost := await self._call(beat):
                logger.warning("requests_lost num=%d why=%s", num_lost, "their router does not beat any more")
        except SQLAlchemyError as error:
            logger.warning("ledger_beat_failed why=%s", reason_of(error))

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def refusal_error(refusal: Refusal, key: Key) -> OverloadedError | InvalidRequestError:
    """Return the error that says which limit is reached and when to come back."""
    what = f"the API key {key.name!r} has reached {refusal.limit}={refusal.allowed}"
    if refusal.retry_after_s is None:
        return InvalidRequestError(f"the request is larger than {refusal.limit}={refusal.allowed} of the API key "
                                   f"{key.name!r} allows", fix="shorten the prompt, or ask for fewer tokens")
    kind = QuotaExceededError if refusal.limit in _BUDGETS else OverloadedError
    return kind(f"{what}: {refusal.used} are used", retry_after_s=refusal.retry_after_s,
                fix=f"try again in {refusal.retry_after_s:.0f} s, or ask for a higher limit")


def _silent() -> NotReadyError:
    return NotReadyError("the database of keys and usage does not answer", fix="try again soon")
