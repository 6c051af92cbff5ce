"""Holds what a shard has yet to tell one router: the coalescing, windowed queue behind one shard link stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serving.engine.request import TokenEvent
from serving.link.messages import merge_events


@dataclass(frozen=True, slots=True)
class OutgoingMessage:
    """One message to write. `sequence`: steps delivered so far; the router acknowledges it when it has handled it."""

    sequence: int
    events: tuple[TokenEvent, ...]


class OutboxClosedError(Exception):
    """The stream is over; the text says why."""


class Outbox:
    """Bounded memory: `hold(True)` is called when `window` steps are unacknowledged, `hold(False)` when half of them
    are handled. What steps under way still deliver is merged per sequence and waits for an acknowledgement."""

    def __init__(self, window: int, hold: Callable[[bool], None]) -> None:
        self._window = max(1, window)
        self._hold = hold
        self._pending: dict[str, TokenEvent] = {}
        self._num_delivered = 0
        self._num_sent = 0
        self._num_acknowledged = 0
        self._is_held = False
        self._wants_message = True          # the greeting: an empty message that says "connected"
        self._closed_because: str | None = None
        self._wakeup = asyncio.Event()

    def deliver(self, events: Iterable[TokenEvent]) -> None:
        """Queue one step's events; never blocks."""
        for event in events:
            earlier = self._pending.get(event.request_id)
            self._pending[event.request_id] = event if earlier is None else merge_events(earlier, event)
        self._num_delivered += 1
        self._wants_message = True
        self._wakeup.set()
        if not self._is_held and self._num_delivered - self._num_acknowledged >= self._window:
            self._is_held = True
            self._hold(True)

    def refresh(self) -> None:
        """Have a message sent even if it has no events, for the load that goes with it."""
        self._wants_message = True
        self._wakeup.set()

    def acknowledge(self, sequence: int) -> None:
        """Note that the router has handled all up to `sequence`; older and impossible numbers change nothing."""
        self._num_acknowledged = max(self._num_acknowledged, min(sequence, self._num_sent))
        self._wakeup.set()
        if self._is_held and self._num_delivered - self._num_acknowledged <= self._window // 2:
            self._is_held = False
            self._hold(False)

    def close(self, why: str) -> None:
        self._closed_because = self._closed_because or why
        self._wakeup.set()

    async def take(self) -> OutgoingMessage:
        """Wait for the next message; everything that has gathered goes into it. Raises OutboxClosedError."""
        while True:
            if self._closed_because is not None:
                raise OutboxClosedError(self._closed_because)
            if self._wants_message and self._num_sent - self._num_acknowledged < self._window:
                return self._take_all()
            self._wakeup.clear()
            await self._wakeup.wait()

    def _take_all(self) -> OutgoingMessage:
        events, self._pending = tuple(self._pending.values()), {}
        self._num_sent = self._num_delivered
        self._wants_message = False
        return OutgoingMessage(self._num_sent, events)
