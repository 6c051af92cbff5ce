"""A collector, and a tracer that sends to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from serving.config import TracingConfig
from serving.tracing import tracer as tracer_module
from serving.tracing.tracer import Tracer
from tests.deadlines import PATIENCE_S
from tests.serving.link.fake_link import clock
from tests.serving.tracing.otlp_receiver import Receiver, grpc_receiver


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that come late on a busy machine are not given up."""
    monkeypatch.setattr(tracer_module, "SEND_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(tracer_module, "SEND_INTERVAL_MS", 20.0)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with grpc_receiver() as receiver:
        yield receiver


@pytest.fixture
async def tracer(receiver: Receiver) -> AsyncIterator[Tracer]:
    tracer = Tracer(TracingConfig(endpoint=receiver.endpoint), "router", "r1", clock)
    yield tracer
    await tracer.close()
