"""Signals that end a command: raised once, so that what the command began is undone, and undone undisturbed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
ALL_SIGNALS = (signal.SIGINT, *ENDING_SIGNALS)


class Interrupted(BaseException):
    """A signal came. Not an Exception: nobody but the one who undoes may catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


@contextlib.contextmanager
def interruptible(signals: tuple[signal.Signals, ...] = ALL_SIGNALS) -> Iterator[None]:
    """Raise Interrupted in the main thread at the first of these signals, in the block; later ones do nothing.

    A signal that is ignored already (`nohup`) stays so. Call it in the main thread.
    """
    has_come = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal has_come
        if not has_come:
            has_come = True
            raise Interrupted(signum)

    handlers = {signum: signal.getsignal(signum) for signum in signals}
    for signum, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            if handler is not None:     # None: not set from Python, so it cannot be put back
                signal.signal(signum, handler)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Put back what a library does to the handlers of signals in the block (ray.init takes SIGTERM)."""
    handlers = {signum: signal.getsignal(signum) for signum in ALL_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            if handler is not None and signal.getsignal(signum) is not handler:
                signal.signal(signum, handler)
