"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.process_pool import ProcessPool


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[ProcessPool]:
    """Four worker processes for all tests that need a group: starting one costs seconds."""
    workers = ProcessPool(4)
    yield workers
    workers.close()
