"""Marks processes that outlive the command that started them, so that a later command stops exactly them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

_KILL_AFTER_S = 2.0         # nothing in these processes is worth a longer goodbye
_SAME_TIME_S = 0.01
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """Names a process, and no later one with the same number."""

    pid: int
    create_time_s: float
    name: str = ""          # for people
    is_vital: bool = False  # without it nothing of its service answers


def mark_of(pid: int, name: str = "", is_vital: bool = False) -> ProcessMark | None:
    """Return its mark, or None when there is no such process any more."""
    try:
        return ProcessMark(pid, psutil.Process(pid).create_time(), name, is_vital)
    except psutil.NoSuchProcess:
        return None


def process_of(mark: ProcessMark) -> psutil.Process | None:
    """Return the process itself while it runs, then None."""
    try:
        process = psutil.Process(mark.pid)
        return process if abs(process.create_time() - mark.create_time_s) < _SAME_TIME_S and _runs(process) else None
    except psutil.NoSuchProcess:
        return None


def are_alive(marks: Sequence[ProcessMark]) -> bool:
    """Return True when any of them runs."""
    return any(process_of(mark) is not None for mark in marks)


def end_process(mark: ProcessMark, timeout_s: float) -> bool:
    """Ask this process alone to end, by SIGTERM. Returns whether it has ended in time."""
    process = process_of(mark)
    if process is None:
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
    return _have_ended([process], timeout_s)


def stop_processes(marks: Sequence[ProcessMark]) -> int:
    """End exactly these processes and their descendants: ask, and after a while kill. Returns how many there were."""
    processes: list[psutil.Process] = []
    for process in map(process_of, marks):
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += [*process.children(recursive=True), process]
    end_all(processes)
    return len(processes)


def end_all(processes: Sequence[psutil.Process]) -> None:
    """Ask, and after a while kill."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        if _have_ended(processes, _KILL_AFTER_S):
            return


def _have_ended(processes: Sequence[psutil.Process], timeout_s: float) -> bool:
    """A zombie has ended: whether its parent ever asks for it is not ours to wait for (psutil.wait_procs would)."""
    until_s = time.monotonic() + timeout_s
    while any(map(_runs, processes)):
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
