"""Writes one line into the log for each client's request, when it has ended: never what it says, only how long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.router.wrapped_service import WrappedService

logger = logging.getLogger(__name__)


class LoggedService(WrappedService):
    def __init__(self, service: Service, clock: Callable[[], float]) -> None:
        super().__init__(service)
        self._clock = clock

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """See Service."""
        line, outcome = _Line(self._clock()), "failed"
        num_open = sum(request.params.n for request in requests)
        try:
            async with aclosing(self._service.generate(requests)) as deltas:
                async for item in deltas:
                    line.add(item[1], self._clock())
                    yield item
            outcome = "finished"
        except (GeneratorExit, asyncio.CancelledError):     # a door that has read the last delta need not read on
            outcome = "finished" if line.num_ended == num_open else "cancelled"
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            line.write(requests, outcome, self._clock())


class _Line:
    """Adds up what one client's request has got."""

    def __init__(self, began_s: float) -> None:
        self.num_ended = 0
        self._began_s = began_s
        self._first_s: float | None = None
        self._num_output = self._num_cached = 0

    def add(self, delta: GenerationDelta, now_s: float) -> None:
        self.num_ended += delta.finish_reason is not None
        self._num_output += len(delta.token_ids)
        self._num_cached += delta.num_cached_tokens or 0
        if self._first_s is None and delta.token_ids:
            self._first_s = now_s - self._began_s

    def write(self, requests: Sequence[GenerationRequest], outcome: str, now_s: float) -> None:
        first = requests[0]
        logger.info("request_ended request_id=%s tenant=%s model=%s outcome=%s num_parts=%d num_prompt_tokens=%d "
                    "num_cached_tokens=%d num_output_tokens=%d first_token_s=%s took_s=%.3f",
                    first.request_id, first.tenant.name, first.model, outcome, len(requests),
                    sum(len(request.prompt_token_ids) for request in requests), self._num_cached, self._num_output,
                    None if self._first_s is None else round(self._first_s, 3), round(now_s - self._began_s, 3))
