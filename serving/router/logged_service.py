"""Writes one line into the log for each client's request, when it has ended: never what it says, only how long."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.router.request_tally import RequestTally
from serving.router.wrapped_service import WrappedService

logger = logging.getLogger(__name__)


class LoggedService(WrappedService):
    def __init__(self, service: Service, clock: Callable[[], float]) -> None:
        super().__init__(service)
        self._clock = clock

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """See Service."""
        tally = RequestTally(requests, self._clock)
        try:
            with tally:
                async with aclosing(self._service.generate(requests)) as deltas:
                    async for item in deltas:
                        tally.add(item[1])
                        yield item
        finally:
            _write(requests, tally)


def _write(requests: Sequence[GenerationRequest], tally: RequestTally) -> None:
    first = requests[0]
    logger.info("request_ended request_id=%s tenant=%s model=%s outcome=%s num_parts=%d num_prompt_tokens=%d "
                "num_cached_tokens=%d num_output_tokens=%d first_token_s=%s took_s=%.3f",
                first.request_id, first.tenant.name, first.model, tally.outcome, len(requests),
                tally.num_prompt_tokens, tally.num_cached_tokens, tally.num_output_tokens,
                None if tally.first_token_s is None else round(tally.first_token_s, 3), round(tally.took_s, 3))
