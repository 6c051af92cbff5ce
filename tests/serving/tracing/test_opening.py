"""A tracer is opened where a config asks for one. tests/test_layers.py shows that nobody else loads OpenTelemetry."""

from __future__ import annotations

from serving.config import TracingConfig
from serving.tracing.opening import open_tracer
from serving.tracing.tracer import Tracer
from tests.serving.link.fake_link import clock
from tests.serving.tracing.otlp_receiver import Receiver


async def test_there_is_a_tracer_where_the_config_asks_for_one(receiver: Receiver) -> None:
    assert open_tracer(None, "router", "r1", clock) is None
    tracer = open_tracer(TracingConfig(endpoint=receiver.endpoint), "router", "r1", clock)
    assert isinstance(tracer, Tracer)
    await tracer.close()
