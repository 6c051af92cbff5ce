"""What every generating endpoint of every API is to those that have bodies for it. Types only."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from pydantic import BaseModel

from serving.ingress.caller import Caller, Stamp


class GenerationBody(Protocol):
    @property
    def stream(self) -> bool | None: ...


G = TypeVar("G", bound=GenerationBody, contravariant=True)
A = TypeVar("A")


class Endpoint(Protocol[G, A]):
    """Makes of an API's body what it asks for, and of that an answer, whole or streamed."""

    async def build(self, body: G, caller: Caller, stamp: Stamp) -> A:
        """Check the body. Raises ServingError."""

    async def answer(self, asked: A) -> BaseModel:
        """Return the whole answer. Raises ServingError."""

    def stream(self, asked: A) -> AsyncGenerator[bytes]:
        """Yield the payloads of the answer's events. Raises ServingError."""
