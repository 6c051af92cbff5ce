"""What the way of a request tells about it to whoever traces it."""

from __future__ import annotations

from typing import Protocol


class RequestTrace(Protocol):
    @property
    def traceparent(self) -> str:
        """Return the W3C header by which spans of other processes belong to this trace; empty: it is not traced."""

    def queued(self, began_s: float, ended_s: float) -> None:
        """Tell how long a part waited for admission."""

    def moved(self, cause: str) -> None:
        """Tell that a sequence goes on elsewhere."""


class Untraced:
    """See RequestTrace. Nobody looks."""

    traceparent = ""

    def queued(self, began_s: float, ended_s: float) -> None: ...
    def moved(self, cause: str) -> None: ...


UNTRACED = Untraced()
