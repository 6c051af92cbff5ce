"""Exactly the marked processes and their descendants are stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from cluster.launch.process_marks import ProcessMark, are_alive, mark_of, stop_processes

# A parent that ignores SIGTERM and has a child.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
signal.pause()
"""


@pytest.fixture
def family() -> Iterator[tuple[ProcessMark, int]]:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        mark = mark_of(process.pid)
        assert mark is not None
        yield mark, child
        process.kill()


def test_a_process_and_its_descendants_are_stopped(family: tuple[ProcessMark, int]) -> None:
    mark, child = family
    assert are_alive([mark])
    assert stop_processes([mark]) == 2
    assert not are_alive([mark])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_another_process_with_the_same_number_is_left_alone(family: tuple[ProcessMark, int]) -> None:
    older = replace(family[0], create_time_s=family[0].create_time_s - 60.0)
    assert not are_alive([older]) and stop_processes([older]) == 0
    assert are_alive([family[0]])


def test_what_is_gone_has_no_mark() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert mark_of(gone.pid) is None
