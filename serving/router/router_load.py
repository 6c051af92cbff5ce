"""The load of one router as the autoscaler counts it: what waits, what runs, and all that ever came. Plain values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serving.router.choice import Choice
from serving.router.open_request import OpenPart

_OLD_PART = 0.98        # of the mean length of outputs, that an output which ends leaves of those before it


@dataclass(frozen=True, slots=True)
class RouterLoad:
    num_held: int = 0               # choices that wait for admission or are open
    num_waiting_tokens: int = 0     # of prompts whose first token has yet to come
    num_decoding: int = 0           # choices whose first token has come
    num_kv_tokens: int = 0          # of all of them, prompts included
    num_arrived: int = 0            # choices since the router began
    num_prompt_tokens: int = 0      # of those; a prompt of several choices counts once
    num_output_tokens: int = 0      # that those were expected to get when they came


class LoadCounter:
    """Counts what comes to a router. Outputs are expected to be as long as the latest ones were, or what was asked."""

    def __init__(self) -> None:
        self._entering: dict[OpenPart, None] = {}       # parts that wait for admission
        self._num_arrived = self._num_prompt_tokens = self._num_output_tokens = 0
        self._mean_output: float | None = None

    def arrived(self, part: OpenPart, num_asked_tokens: int) -> None:
        """Count a part that comes, and waits for admission until `entered`. `num_asked_tokens`: of each choice."""
        num_choices = part.request.params.n
        expected = num_asked_tokens if self._mean_output is None else min(num_asked_tokens, round(self._mean_output))
        self._entering[part] = None
        self._num_arrived += num_choices
        self._num_prompt_tokens += part.num_prompt_tokens
        self._num_output_tokens += num_choices * expected

    def entered(self, part: OpenPart) -> None:
        """The part was admitted, or goes away."""
        self._entering.pop(part, None)

    def ended(self, num_output_tokens: int) -> None:
        """Learn from a choice that has ended how long outputs are."""
        before = num_output_tokens if self._mean_output is None else self._mean_output
        self._mean_output = before * _OLD_PART + num_output_tokens * (1 - _OLD_PART)

    def load(self, placed: Iterable[tuple[OpenPart, Choice]]) -> RouterLoad:
        """Return the load, with the choices that were admitted and have not ended."""
        num_held = num_waiting = num_decoding = num_kv = 0
        for part in self._entering:
            num_held += part.request.params.n
            num_waiting += part.num_prompt_tokens
            num_kv += part.num_prompt_tokens
        for part, choice in placed:
            num_held += 1
            num_decoding += choice.num_tokens > 0
            num_waiting += part.num_prompt_tokens if not choice.num_tokens and not choice.index else 0
            num_kv += choice.num_tokens + (0 if choice.index else part.num_prompt_tokens)
        return RouterLoad(num_held, num_waiting, num_decoding, num_kv, self._num_arrived, self._num_prompt_tokens,
                          self._num_output_tokens)
