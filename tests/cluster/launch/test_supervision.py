"""The process that supervises a start ends with it and leaves nothing behind. (With Ray: tests/e2e/test_life_cycle.py)

`start_supervised` forks, so it is tried in processes of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.launch.process_marks import ProcessMark, mark_of
from cluster.launch.state_file import NoClusterError, RunningCluster, read_state, write_state
from tests.deadlines import PATIENCE_S

# The child starts a process that outlives it and has left its session, then does what the test says.
PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from cluster.launch.interruption import Interrupted
from cluster.launch.supervision import start_supervised
try:
    parent = start_supervised(Path(sys.argv[1]), "one")
except Interrupted as interrupted:
    sys.exit(interrupted.exit_code)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(parent, other.pid, len(os.listdir("/proc/self/task")), flush=True)
exec(sys.argv[2])
"""


@contextlib.contextmanager
def supervised(state_dir: Path, then: str) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """Yield the process, and the numbers of the parent and of what the child has started. None outlives the block."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(state_dir), then], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True) as process:
        assert process.stdout is not None
        parent, other, num_threads = map(int, process.stdout.readline().split())
        try:
            assert num_threads == 1, "threads do not survive a fork"
            yield process, parent, other
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def note(state_dir: Path, starter_pid: int) -> None:
    """As BringUp does before anything answers."""
    write_state(RunningCluster("one", "127.0.0.1:1", "http://127.0.0.1:1", "m", starter=mark_of(starter_pid),
                               processes=(ProcessMark(2 ** 22, 1.0),)), state_dir)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_that_was_started_and_its_note(tmp_path: Path, signum: signal.Signals) -> None:
    with supervised(tmp_path, "time.sleep(600)") as (process, parent, other):
        assert parent == process.pid
        note(tmp_path, parent)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 128 + signum, errors
        assert not runs(other)
        with pytest.raises(NoClusterError):
            read_state(tmp_path)


@pytest.mark.parametrize(("then", "exit_code"), [("sys.exit(3)", 3), ("os.abort()", 128 + signal.SIGABRT)])
def test_a_child_that_fails_leaves_nothing(tmp_path: Path, then: str, exit_code: int) -> None:
    with supervised(tmp_path, then) as (process, _, other):
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == exit_code, errors
        assert not runs(other)


def test_what_was_started_stays_when_the_child_succeeds(tmp_path: Path) -> None:
    with supervised(tmp_path, "sys.exit(0)") as (process, _, other):
        assert process.wait(timeout=PATIENCE_S) == 0
        assert runs(other)
