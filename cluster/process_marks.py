"""Processes that outlive the command that started them, and how a later command stops exactly them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

_KILL_AFTER_S = 2.0         # nothing in these processes is worth a longer goodbye
_SAME_TIME_S = 0.01


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """A process, and no later one with the same number."""

    pid: int
    create_time_s: float


def mark_of(pid: int) -> ProcessMark | None:
    """None when there is no such process any more."""
    try:
        return ProcessMark(pid, psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def process_of(mark: ProcessMark) -> psutil.Process | None:
    """The process itself, while it runs."""
    try:
        process = psutil.Process(mark.pid)
        is_same = abs(process.create_time() - mark.create_time_s) < _SAME_TIME_S
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def are_alive(marks: Sequence[ProcessMark]) -> bool:
    """Whether any of them runs."""
    return any(process_of(mark) is not None for mark in marks)


def stop_processes(marks: Sequence[ProcessMark]) -> int:
    """End exactly these processes and their descendants: ask, and after a while kill. Returns how many there were."""
    processes: list[psutil.Process] = []
    for process in map(process_of, marks):
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += [*process.children(recursive=True), process]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_KILL_AFTER_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_KILL_AFTER_S)
    return len(processes)
