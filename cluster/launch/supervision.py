"""Makes a signal undo a start, whatever Ray's libraries do in the process that starts.

Ray's core blocks in calls that no Python signal handler interrupts, ends its process by itself when a node goes, and
prints stacks at SIGTERM. So `moesaic up` forks: the child starts the service, the parent only waits. When a signal
comes the parent ends the child and everything it has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

import psutil

from cluster.launch.interruption import ALL_SIGNALS, Interrupted, interruptible, uninterrupted
from cluster.launch.process_marks import end_all

_PR_SET_CHILD_SUBREAPER = 36


def start_supervised(state_dir: Path, application: str) -> int:
    """Return in a new child process that is to start the application, with the number of the parent.

    The parent ends as the child does; when the child has failed, or a signal has come, it undoes the start first.
    The child has a session of its own: what a terminal sends to its processes reaches the parent only. Call it before
    there are threads.
    """
    parent = os.getpid()
    _adopt_orphans()
    with interruptible(ALL_SIGNALS):
        child = None
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)       # until it is known whom to end
            try:
                child = os.fork()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
            if child == 0:
                os.setsid()
                return parent
            exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except Interrupted:     # no later signal is raised while this is handled
            if child is not None:
                _undo(child, state_dir, application)
            raise
        if exit_code != 0:
            with uninterrupted():
                _undo(child, state_dir, application)
    raise SystemExit(exit_code if exit_code >= 0 else 128 - exit_code)


def _undo(child: int, state_dir: Path, application: str) -> None:
    _end_descendants(child)

    from cluster.launch.bring_up import undo_start  # not before the fork: it starts threads, and takes long
    undo_start(state_dir, application, os.getpid())


def _end_descendants(child: int) -> None:
    """End the child and all below it. It is halted first: it must not start more while the rest is counted."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGSTOP)
    descendants = psutil.Process().children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    end_all(descendants)


def _adopt_orphans() -> None:
    """Make what a descendant leaves when it ends a child of this process, where the system can do that (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
