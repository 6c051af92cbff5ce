"""A signal is raised once, in the block, and every handler comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cluster.launch.interruption import (
    ALL_SIGNALS,
    Interrupted,
    children_unaware,
    interruptible,
    signals_kept,
    uninterrupted,
)
from tests.deadlines import PATIENCE_S


@pytest.mark.parametrize("signum", ALL_SIGNALS)
def test_the_first_signal_ends_the_block_and_later_ones_do_not_disturb_its_undoing(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    undone = False
    with pytest.raises(Interrupted, match=f"ended by {signum.name}") as raised, interruptible(ALL_SIGNALS):
        try:
            signal.raise_signal(signum)
            raise AssertionError("the signal must end the block")
        except Interrupted:
            for later in ALL_SIGNALS:
                signal.raise_signal(later)
            undone = True
            raise
    assert undone and raised.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(ALL_SIGNALS):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_disturbs_what_must_come_to_its_end() -> None:
    with interruptible(ALL_SIGNALS), uninterrupted():
        for signum in ALL_SIGNALS:
            signal.raise_signal(signum)


def test_handlers_that_a_library_takes_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is before


def test_children_do_not_notice_ctrl_c_and_this_process_does_when_they_have_started() -> None:
    started = False
    with pytest.raises(Interrupted), interruptible(ALL_SIGNALS), children_unaware():
        child = subprocess.Popen([sys.executable, "-c", "print('whole')"], stdout=subprocess.PIPE)
        os.kill(child.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        started = True
    assert started and child.communicate(timeout=PATIENCE_S)[0] == b"whole\n" and child.returncode == 0
