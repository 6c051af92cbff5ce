"""What a Service that stands before another passes on unchanged."""

from __future__ import annotations

from serving.router.generation import ModelCard, Service


class WrappedService:
    """A Service like that which it asks; a subclass says what it does of its own in `generate`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        return self._service.cards

    def is_ready(self) -> bool:
        return self._service.is_ready()
