"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.process_pool import ProcessPool

# Before torch is imported, also by processes of tests: its threads wait by spinning, on cores that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("moesaic", deadline=None)
hypothesis.settings.load_profile("moesaic")

# A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# In this order; those of one kind share what is costly to make, those without are a piece each.
_LONGEST_FIRST = {"tests/e2e/": "Ray", "tests/model/dispatch/": "process groups",
                  "tests/cluster/shard/": "process groups", "tests/model/test_pace.py": "process groups",
                  "tests/oracle/test_demo_model.py": "", "tests/oracle/": "process groups", "tests/benchmarks/": ""}


class FilesOfOneKind(LoadScopeScheduling):
    """Gives workers whole files, whose fixtures are made once; all files that share costly ones are a single piece."""

    def _split_scope(self, nodeid: str) -> str:
        return next((kind for place, kind in _LONGEST_FIRST.items() if nodeid.startswith(place)),
                    "") or nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesOfOneKind:
    """Several workers of one `make test`, see the Makefile."""
    return FilesOfOneKind(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    places = list(_LONGEST_FIRST)
    items.sort(key=lambda item: next((rank for rank, place in enumerate(places) if item.nodeid.startswith(place)),
                                     len(places)))


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[ProcessPool]:
    """Four worker processes for all tests that need a group: starting one costs seconds."""
    workers = ProcessPool(4)
    yield workers
    workers.close()
