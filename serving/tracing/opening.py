"""Opens a process's tracer, if its config asks for one: OpenTelemetry is loaded then, and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from serving.config import TracingConfig

if TYPE_CHECKING:
    from serving.tracing.tracer import Tracer


def open_tracer(config: TracingConfig | None, role: str, instance_id: str, clock: Callable[[], float]
                ) -> Tracer | None:
    """Return the tracer of one process, to be closed with `close`; None where nothing is traced. Times of its spans
    are those of `clock`."""
    if config is None:
        return None
    from serving.tracing.tracer import Tracer

    return Tracer(config, role, instance_id, clock)
