"""The hub that every fetch of a test is from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.device.hub_nodes import a_hub
from tests.cluster.device.hub_server import FakeHub, running


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running(a_hub()) as hub:
        yield hub
