"""The router's service for requests that nobody waits for: they have time, and the least urgent priority."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from serving.priority import MAX_PRIORITY
from serving.router.generation import GenerationDelta, GenerationRequest
from serving.router.wrapped_service import WrappedService

DEADLINE_S = 3600.0


class PatientService(WrappedService):
    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """See Service."""
        async with aclosing(self._service.generate([
                replace(request, deadline_s=DEADLINE_S, priority=MAX_PRIORITY) for request in requests])) as deltas:
            async for item in deltas:
                yield item
