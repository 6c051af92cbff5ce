"""Counts every request of a key, in front of the router's service: its limits before, what it used after.

A request without a key passes: then everybody may ask, and nobody pays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from uuid import uuid4

from serving.errors import ForbiddenError, InvalidRequestError, ServingError
from serving.metrics import TenantMetrics
from serving.priority import DEFAULT_PRIORITY
from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.router.service import ADMITTED_OUTPUT_TOKENS
from serving.router.wrapped_service import WrappedService
from serving.tenants.key import Key
from serving.tenants.ledger import Opening, Outcome, Used
from serving.tenants.meter import Meter
from serving.tenants.standing import Ask


class MeteredService(WrappedService):
    def __init__(self, service: Service, meter: Meter, clock: Callable[[], float], metrics: TenantMetrics
                 ) -> None:
        """`clock` is Unix time."""
        super().__init__(service)
        self._meter = meter
        self._clock = clock
        self._metrics = metrics

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """See Service. Raises what Meter.open raises too; ForbiddenError for a model that the key is not for."""
        key = requests[0].tenant.key
        if key is None:
            async with aclosing(self._service.generate(requests)) as deltas:
                async for item in deltas:
                    yield item
            return
        max_model_len = self.cards[0].max_model_len
        requests = [_within_key(request, key, max_model_len) for request in requests]
        opening = Opening(uuid4().hex, requests[0].request_id, key, requests[0].model, ask_of(requests, max_model_len),
                          self._clock())
        try:
            grant = await self._meter.open(opening)
        except ServingError as error:
            self._metrics.refused(key.tenant, error)
            raise
        if grant.num_tokens < opening.ask.num_most:
            requests = _within_grant(requests, grant.num_tokens)
        tally, outcome = _Tally(requests), Outcome.FAILED
        try:
            async with aclosing(self._service.generate(requests)) as deltas:
                async for item in deltas:
                    self._meter.progress(opening.usage_id, tally.add(*item, self._clock()))
                    yield item
            outcome = Outcome.FINISHED
        except (GeneratorExit, asyncio.CancelledError):
            outcome = Outcome.FINISHED if tally.is_over else Outcome.CANCELLED
            raise
        finally:
            used = tally.used()
            self._meter.end(opening.usage_id, key, outcome, used)
            self._metrics.ended(key.tenant, outcome.value, used.num_prompt, used.num_cached, used.num_generated)


class _Tally:
    """Adds up what one client's request has used. A prompt counts once its first token is there."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._num_prompt = [len(request.prompt_token_ids) for request in requests]
        self._reasoning = [request.reasoning for request in requests]
        self._seen: set[int] = set()
        self._num_open = sum(request.params.n for request in requests)
        self._used = Used()

    @property
    def is_over(self) -> bool:
        """Return whether all choices have ended: a door that has read the last one need not read on."""
        return self._num_open == 0

    def used(self) -> Used:
        """Return what was used, with the reasoning that the readers of the answers have found."""
        return replace(self._used, num_reasoning=sum(count.num_tokens for count in self._reasoning))

    def add(self, index: int, delta: GenerationDelta, now_s: float) -> Used:
        used = self._used
        if index not in self._seen:
            self._seen.add(index)
            used = replace(used, num_prompt=used.num_prompt + self._num_prompt[index],
                           num_cached=used.num_cached + (delta.num_cached_tokens or 0),
                           first_token_s=used.first_token_s or now_s)
        self._num_open -= delta.finish_reason is not None
        self._used = replace(used, num_generated=used.num_generated + len(delta.token_ids))
        return self._used


def ask_of(requests: Sequence[GenerationRequest], max_model_len: int) -> Ask:
    """Return the tokens that the requests may use together."""
    least = most = expected = 0
    for request in requests:
        num_prompt, n, max_tokens = len(request.prompt_token_ids), request.params.n, request.params.max_tokens
        room = max(1, max_model_len - num_prompt)
        least += num_prompt + n * (max_tokens or 1)
        most += num_prompt + n * (max_tokens or room)
        expected += num_prompt + n * (max_tokens or min(room, ADMITTED_OUTPUT_TOKENS))
    return Ask(least, most, expected)


def _within_key(request: GenerationRequest, key: Key, max_model_len: int) -> GenerationRequest:
    """Return the request with the key's max_tokens and priority where it sets none.

    Raises ForbiddenError, InvalidRequestError.
    """
    if key.models and request.model not in key.models:
        raise ForbiddenError(f"the API key {key.name!r} is not for the model {request.model!r}", param="model",
                             fix=f"it is for: {', '.join(sorted(key.models))}")
    if request.priority is not None and request.priority < key.priority:
        raise ForbiddenError(f"priority={request.priority} is more urgent than the API key {key.name!r} allows",
                             param="priority", fix=f"ask for {key.priority} or more, or leave it out")
    if request.priority is None:
        request = replace(request, priority=max(key.priority, DEFAULT_PRIORITY))
    limit, params = key.limits.max_tokens, request.params
    if limit is None:
        return request
    for name, value in (("max_tokens", params.max_tokens), ("min_tokens", params.min_tokens)):
        if value is not None and value > limit:
            raise InvalidRequestError(f"{name}={value} is more than the {limit} tokens that the API key {key.name!r} "
                                      "allows an answer", fix=f"ask for at most {limit}", param=name)
    if params.max_tokens is not None or len(request.prompt_token_ids) + limit >= max_model_len:
        return request
    return replace(request, params=params.model_copy(update={"max_tokens": limit}))


def _within_grant(requests: Sequence[GenerationRequest], num_tokens: int) -> list[GenerationRequest]:
    """Return the requests, those that set no max_tokens with an equal part of the tokens that are left for them."""
    num_least = sum(len(one.prompt_token_ids) + one.params.n * (one.params.max_tokens or 1) for one in requests)
    num_choices = sum(one.params.n for one in requests if one.params.max_tokens is None)
    max_tokens = 1 + (num_tokens - num_least) // num_choices
    return [one if one.params.max_tokens is not None
            else replace(one, params=one.params.model_copy(update={"max_tokens": max_tokens})) for one in requests]
