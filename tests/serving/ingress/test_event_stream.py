"""A stream that fails or loses its client ends cleanly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message

from serving.ingress.event_stream import EventStream


class Wire:
    """The server's side of ASGI: takes `num_taken` messages, then raises as a server does whose client left."""

    def __init__(self, num_taken: int = 99) -> None:
        self.sent: list[Message] = []
        self.num_taken = num_taken

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        if len(self.sent) == self.num_taken:
            raise OSError("broken pipe")
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Payloads:
    def __init__(self, number: int, fails: bool = False) -> None:
        self.number, self.fails, self.closed = number, fails, False

    async def stream(self) -> AsyncGenerator[bytes]:
        try:
            for index in range(self.number):
                yield str(index).encode()
            if self.fails:
                raise RuntimeError("boom")
        finally:
            self.closed = True


async def run(payloads: Payloads, wire: Wire) -> None:
    response = EventStream(payloads.stream(), lambda error: PlainTextResponse(str(error), 500))
    async with asyncio.timeout(30):
        await response({"type": "http"}, wire.receive, wire.send)
    assert payloads.closed


async def test_events_end_with_done() -> None:
    wire = Wire()
    await run(Payloads(2), wire)
    assert wire.body == b"data: 0\n\ndata: 1\n\ndata: [DONE]\n\n"
    assert wire.sent[0]["status"] == 200 and wire.sent[-1]["more_body"] is False
    assert b"content-length" not in dict(wire.sent[0]["headers"])


async def test_a_late_error_is_an_event_and_not_done() -> None:
    wire = Wire()
    await run(Payloads(1, fails=True), wire)
    assert wire.body == b"data: 0\n\ndata: boom\n\n" and wire.sent[-1]["more_body"] is False


async def test_an_early_error_is_the_answer() -> None:
    wire = Wire()
    await run(Payloads(0, fails=True), wire)
    assert wire.sent[0]["status"] == 500 and wire.body == b"boom"


@pytest.mark.parametrize("num_taken", [0, 1, 2, 3])
async def test_a_wire_that_breaks_closes_the_payloads(num_taken: int) -> None:
    await run(Payloads(5), Wire(num_taken))
