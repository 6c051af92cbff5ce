"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.process_pool import ProcessPool

# Before torch is imported, also by processes of tests: its threads wait by spinning, on cores that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[ProcessPool]:
    """Four worker processes for all tests that need a group: starting one costs seconds."""
    workers = ProcessPool(4)
    yield workers
    workers.close()
