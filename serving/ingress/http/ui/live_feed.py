"""Shares one look at the group among all who listen. While nobody listens, nobody looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

from serving.errors import OverloadedError
from serving.ingress.http.ui.snapshot import Snapshot

LOOK_S = 1.0
MAX_LISTENERS = 32
_RETRY_AFTER_S = 10.0


class LiveFeed:
    """`look` returns how things are now. Runs on one event loop."""

    def __init__(self, look: Callable[[], Awaitable[Snapshot]], clock: Callable[[], float],
                 interval_s: float = LOOK_S) -> None:
        self._look = look
        self._clock = clock
        self._interval_s = interval_s
        self.num_listeners = 0
        self._closed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._latest: dict[str, bytes] | None = None
        self._looked_s = 0.0

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield server-sent events: each part of the snapshot, and again when it has changed. Raises OverloadedError.

        A listener that takes nothing is not looked for: it gets the latest when it goes on. The door ends its
        connection after a while.
        """
        if self.num_listeners >= MAX_LISTENERS:
            raise OverloadedError(f"{MAX_LISTENERS} pages are open at this router", retry_after_s=_RETRY_AFTER_S,
                                  fix="close one, or open the page of another router")
        self.num_listeners += 1
        told: dict[str, bytes] = {}
        try:
            while not self._closed.is_set():
                for name, content in (await self._fresh()).items():
                    if told.get(name) != content:
                        told[name] = content
                        yield b"event: %b\ndata: %b\n\n" % (name.encode(), content)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._closed.wait()
        finally:
            self.num_listeners -= 1
            if not self.num_listeners:
                self._latest = None

    def close(self) -> None:
        """End all listeners: an open page must not hold a router's end up."""
        self._closed.set()

    async def _fresh(self) -> dict[str, bytes]:
        """Return a look that is young enough, so that many listeners cost what one costs."""
        async with self._lock:
            if self._latest is None or self._clock() - self._looked_s >= self._interval_s / 2:
                self._latest = (await self._look()).events()
                self._looked_s = self._clock()
            return self._latest
