"""Keeps what the solver's library writes by itself out of a program's output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def solver_output_to_stderr() -> Iterator[None]:
    """HiGHS prints a line of its own now and then, whatever its options say: not into output that others parse.

    For programs with one thread: the process's standard output goes to standard error meanwhile.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
