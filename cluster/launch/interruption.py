"""Turns signals that end a command into an exception, raised once, with the exit code that shells expect."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
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
def interruptible(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Raise Interrupted in the main thread at the first of these signals, in the block; later ones do nothing there.

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
        _put_back(handlers)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal disturb the block: what is undone half is worse than a command that takes a second longer."""
    handlers = {signum: signal.signal(signum, lambda *_: None) for signum in ALL_SIGNALS}
    try:
        yield
    finally:
        _put_back(handlers)


@contextlib.contextmanager
def children_unaware() -> Iterator[None]:
    """Start processes in the block that do not notice what a terminal sends to them too (Ctrl-C): this process ends
    them, without their stacks on the screen. Signals to this process wait for the end of the block."""
    came: list[int] = []
    handlers = {signum: signal.signal(signum, lambda number, _: came.append(number)) for signum in ALL_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})     # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _put_back(handlers)
        for signum in came[:1]:
            signal.raise_signal(signum)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Put back what a library does to the handlers of signals in the block (ray.init takes SIGTERM, in C++ too)."""
    handlers = {signum: signal.getsignal(signum) for signum in ALL_SIGNALS}
    try:
        yield
    finally:
        _put_back(handlers)


def _put_back(handlers: Mapping[signal.Signals, object]) -> None:
    for signum, handler in handlers.items():
        if handler is not None:         # None: not set from Python, so it cannot be put back
            signal.signal(signum, handler)      # type: ignore[arg-type]
