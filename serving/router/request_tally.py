"""Adds up what one client's request has got, and says what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from serving.router.generation import GenerationDelta, GenerationRequest


class RequestTally:
    """Is entered around the reading of a request's deltas. `outcome`: finished, cancelled, or an error's class."""

    def __init__(self, requests: Sequence[GenerationRequest], clock: Callable[[], float]) -> None:
        self.outcome = "failed"
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_output_tokens = self.num_cached_tokens = 0
        self.first_token_s: float | None = None         # since it began; None: there was none
        self.finish_reasons: list[str] = []             # of the choices that have ended
        self._num_choices = sum(request.params.n for request in requests)
        self._clock = clock
        self._began_s = clock()

    def add(self, delta: GenerationDelta) -> None:
        now_s = self._clock()
        if delta.finish_reason is not None:
            self.finish_reasons.append(delta.finish_reason.value)
        self.num_output_tokens += len(delta.token_ids)
        self.num_cached_tokens += delta.num_cached_tokens or 0
        if self.first_token_s is None and delta.token_ids:
            self.first_token_s = now_s - self._began_s

    @property
    def took_s(self) -> float:
        return self._clock() - self._began_s

    def __enter__(self) -> RequestTally:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.outcome = "finished"
        elif issubclass(kind, (GeneratorExit, asyncio.CancelledError)):
            # A door that has read the last delta need not read on.
            self.outcome = "finished" if len(self.finish_reasons) == self._num_choices else "cancelled"
        elif issubclass(kind, Exception):
            self.outcome = kind.__name__
