"""A stream that fails or loses its client ends cleanly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message

from serving.ingress.http import event_stream
from serving.ingress.http.event_stream import WRITE_NOW, EventStream
from tests.deadlines import PATIENCE_S


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
    async with asyncio.timeout(PATIENCE_S):
        await response({"type": "http"}, wire.receive, wire.send)
    assert payloads.closed


async def test_events_end_with_done() -> None:
    wire = Wire()
    await run(Payloads(2), wire)
    assert wire.body == b"data: 0\n\ndata: 1\n\ndata: [DONE]\n\n"
    assert wire.sent[0]["status"] == 200 and wire.sent[-1]["more_body"] is False
    assert b"content-length" not in dict(wire.sent[0]["headers"])


@pytest.mark.parametrize("takes", [[True, True, True], [False, True, False], [False, False, False]])
async def test_what_the_door_cannot_write_at_once_is_sent_in_its_place(takes: list[bool]) -> None:
    wire, answers = Wire(), iter(takes)

    def write(body: bytes) -> bool:
        if is_taken := next(answers):
            wire.sent.append({"type": "now", "body": body})
        return is_taken

    response = EventStream(Payloads(3).stream(), lambda error: PlainTextResponse(str(error), 500))
    scope = {"type": "http", "extensions": {WRITE_NOW: {"write": write}}}
    async with asyncio.timeout(PATIENCE_S):
        await response(scope, wire.receive, wire.send)
    assert wire.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert [message["type"] == "now" for message in wire.sent[1:4]] == takes


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


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
async def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch, num_before: int, fails: bool) -> None:
    """Also before the first payload: then the answer has begun, and an error is an event."""
    monkeypatch.setattr(event_stream, "SILENCE_S", 0.01)
    wire = Wire(num_taken=10**6)

    async def payloads() -> AsyncGenerator[bytes]:
        for _ in range(num_before):
            yield b"0"
        while wire.body.count(b": waiting\n\n") < 2:       # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if fails:
            raise RuntimeError("boom")
        yield b"1"
    response = EventStream(payloads(), lambda error: PlainTextResponse(str(error), 503))
    async with asyncio.timeout(60):
        await response({"type": "http"}, wire.receive, wire.send)
    assert [message["type"] for message in wire.sent].count("http.response.start") == 1
    assert wire.sent[0]["status"] == 200 and wire.sent[-1]["more_body"] is False
    events = wire.body.replace(b": waiting\n\n", b"")
    assert events == b"data: 0\n\n" * num_before + (b"data: boom\n\n" if fails else b"data: 1\n\ndata: [DONE]\n\n")
