"""What clients may do to a connection of the HTTP door, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from starlette.applications import Starlette

from cluster.device.node import listen
from serving.ingress.http import protocol as http_protocol
from serving.ingress.http.server import HttpServer
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import FakeService

BODY = json.dumps({"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 4}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(BODY)
WHOLE = POST + b"\r\n" + BODY
STREAM = WHOLE.replace(b'"max_tokens": 4', b'"stream":  1').replace(b"1}", b"true}")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def error(self) -> dict[str, str]:
        return dict(json.loads(self.content)["error"])


class Client:
    """One connection, at the level of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def answer(self, has_body: bool = True) -> Answer:
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
            content = b""
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readline(), 16):
                    content += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            elif has_body:
                content = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return Answer(int(head[0].split()[1]), headers, content)

    async def ask(self, *parts: bytes) -> Answer:
        await self.send(*parts)
        return await self.answer()

    async def is_closed(self) -> bool:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read(1) == b""


@dataclass
class Door:
    server: HttpServer
    port: int

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()


@asynccontextmanager
async def opened(app: Starlette, max_connections: int = 100) -> AsyncIterator[Door]:
    server, listener = HttpServer(app, max_connections), listen("127.0.0.1", 0)
    await server.start(listener)
    try:
        yield Door(server, int(listener.getsockname()[1]))
    finally:
        server.refuse()
        server.close()


@pytest.fixture
async def door(app: Starlette) -> AsyncIterator[Door]:
    async with opened(app) as door:
        yield door


@pytest.fixture
async def client(door: Door) -> AsyncIterator[Client]:
    async with door.client() as client:
        yield client


async def test_a_connection_serves_many_requests(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for _ in range(3):
        answer = await client.ask(WHOLE)
        assert answer.status == 200 and json.loads(answer.content)["usage"]["completion_tokens"] == 4
        assert "date" in answer.headers and "connection" not in answer.headers
    assert (await client.ask(*(WHOLE[index:index + 1] for index in range(len(WHOLE))))).status == 200
    streamed = await client.ask(STREAM)
    assert streamed.headers["transfer-encoding"] == "chunked" and streamed.content.endswith(b"data: [DONE]\n\n")
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")], "no line a request"


@pytest.mark.parametrize("offer", [
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\n",
    b"Upgrade: TLS/1.0\r\nConnection: keep-alive, Upgrade\r\n", b"upgrade: h2c\r\n"])
async def test_an_offer_of_another_protocol_is_not_taken_up(client: Client, offer: bytes) -> None:
    for _ in range(2):
        for parts in ([POST + offer + b"\r\n" + BODY], [POST, offer, b"\r\n", BODY[:9], BODY[9:]]):
            answer = await client.ask(*parts)
            assert answer.status == 200 and json.loads(answer.content)["usage"]["completion_tokens"] == 4
        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n" + offer
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        assert (await client.ask(chunked + b"\r\n" + body)).status == 200
        assert (await client.ask(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + offer + b"\r\n")).status == 200


async def test_what_is_no_request_is_refused_in_the_apis_shape(door: Door) -> None:
    for content, status, code in (
            (b"hello\r\n\r\n", 400, "invalid_http"), (b"\x16\x03\x01\x02\x00\x01", 400, "invalid_http"),
            (b"GET / HTTP/9.9\r\n\r\n", 400, "invalid_http"),
            (b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400, "invalid_http"),
            (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400, "invalid_http"),
            (b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", 405, "method_not_allowed"),
            (b"CONNECT a:1 HTTP/1.1\r\n" + b"x: y\r\n" * 300 + b"\r\n", 431, "headers_too_large"),
            (b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400, "invalid_http")):
        async with door.client() as client:
            answer = await client.ask(content)
            assert (answer.status, answer.error["code"]) == (status, code), content
            assert set(answer.error) == {"message", "type", "param", "code"} and answer.headers["connection"] == "close"
            assert await client.is_closed()


@pytest.mark.parametrize("parts", [
    (b"x: %s\r\n" % (b"y" * 70_000), b"\r\n"), (b"x: %s" % (b"y" * 40_000), b"y" * 40_000),
    (b"x: y\r\n" * 257, b"\r\n"),
    (*(b"x%d: y\r\n" % number for number in range(20_000)),), (b"x" * 70_000,)])
async def test_a_head_without_end_is_refused(client: Client, parts: tuple[bytes, ...]) -> None:
    answer = await client.ask(b"GET /health HTTP/1.1\r\n" + b"".join(parts[:1]), *parts[1:])
    assert answer.status == 431 and answer.error["code"] == "headers_too_large"
    assert await client.is_closed()


async def test_an_address_without_end_is_refused(client: Client) -> None:
    assert (await client.ask(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n")).status == 431


async def test_what_follows_a_body_in_chunks_is_no_header(client: Client, service: FakeService) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n"
    whole = head % (len(BODY), BODY)
    answer = await client.ask(whole + b"x-request-id: late\r\ncontent-encoding: gzip\r\n\r\n")
    assert answer.status == 200 and answer.headers["x-request-id"] != "late"
    endless = await client.ask(whole, b"x: " + b"y" * 700_000)
    assert endless.status == 431 and await client.is_closed()


async def test_a_client_that_says_nothing_is_not_waited_for(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.0)
    for beginning in (b"", b"POST /v1/comp", POST):
        async with door.client() as client:
            if beginning:
                await client.send(beginning)
            answer = await client.answer()
            assert answer.status == 408 and answer.error["code"] == "request_timeout" and await client.is_closed()


async def test_a_second_head_has_its_time_too(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await client.ask(WHOLE)).status == 200
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.0)
    assert (await client.ask(b"\r\n")).status == 408 and await client.is_closed()


async def test_a_connection_without_requests_is_closed(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.ingress.http.server.KEEP_ALIVE_S", 0)
    async with opened(app) as door, door.client() as client:
        assert (await client.ask(WHOLE)).status == 200 and await client.is_closed()


async def test_requests_behind_each_other_are_answered_in_order(door: Door) -> None:
    asks = [b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-request-id: r%d\r\n\r\n" % number for number in range(40)]
    async with door.client() as client:
        await client.send(STREAM + WHOLE + asks[1])
        assert (await client.answer()).content.endswith(b"[DONE]\n\n")
        assert (await client.answer()).status == 200
        assert (await client.answer()).headers["x-request-id"] == "r1"
        assert (await client.ask(asks[2])).headers["x-request-id"] == "r2"
    async with door.client() as client:
        await client.send(STREAM + b"".join(asks))      # too many at once: those that are taken are answered
        answers = [await client.answer() for _ in range(1 + http_protocol.MAX_PIPELINED)]
        assert [answer.headers["x-request-id"] for answer in answers[1:]] == [f"r{number}" for number in range(16)]
        assert answers[-1].headers["connection"] == "close" and await client.is_closed()


async def test_what_follows_a_request_does_not_break_its_answer(client: Client) -> None:
    answer = await client.ask(STREAM + b"\x00\x01 rubbish\r\n\r\n")
    assert answer.status == 200 and answer.content.endswith(b"data: [DONE]\n\n")
    assert await client.is_closed()


async def test_head_answers_without_a_body(client: Client) -> None:
    await client.send(b"HEAD /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
    answer = await client.answer(has_body=False)
    assert answer.status == 200 and int(answer.headers["content-length"]) > 10
    assert (await client.ask(WHOLE)).status == 200


async def test_a_client_that_waits_for_100_gets_it_or_its_refusal(door: Door) -> None:
    expects = POST + b"expect: 100-continue\r\n\r\n"
    async with door.client() as client:
        for _ in range(2):
            assert (await client.ask(expects)).status == 100
            assert (await client.ask(BODY)).status == 200
    for refused, status in ((expects.replace(b"/v1/completions", b"/nowhere"), 404),
                            (expects.replace(b"length: ", b"length: 9999999"), 413)):
        async with door.client() as client:
            answer = await client.ask(refused)      # its next bytes would be taken for the body that is not sent
            assert answer.status == status and answer.headers["connection"] == "close" and await client.is_closed()


async def test_a_body_that_was_answered_unread_is_skipped(client: Client) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n"
    answer = await client.ask(head)
    assert answer.status == 404
    await client.send(b"x" * 3_000_000)
    assert (await client.ask(WHOLE)).status == 200


async def test_old_clients_are_answered_and_let_go(client: Client) -> None:
    answer = await client.ask(WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert answer.status == 200 and answer.headers["connection"] == "close" and await client.is_closed()


@pytest.mark.parametrize("body", [WHOLE, STREAM])
async def test_a_client_that_leaves_cancels(door: Door, service: FakeService, body: bytes) -> None:
    service.stalls = True
    async with asyncio.timeout(PATIENCE_S):
        async with door.client() as client:
            await client.send(body)
            await service.started.wait()
        await service.closed.wait()


async def test_a_client_that_takes_nothing_loses_its_connection(door: Door, service: FakeService,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    service.stalls = True
    async with asyncio.timeout(PATIENCE_S), door.client() as client:
        await client.send(STREAM)
        await service.started.wait()
        (connection,) = door.server.connections
        connection.pause_writing()                  # as the transport does over its high-water mark
        connection.resume_writing()
        monkeypatch.setattr(http_protocol, "STALLED_S", 0.0)
        connection.pause_writing()
        await service.closed.wait()


async def test_a_connection_too_many_is_told_so(app: Starlette) -> None:
    async with opened(app, max_connections=1) as door, door.client() as first:
        assert (await first.ask(WHOLE)).status == 200
        async with door.client() as second:
            answer = await second.answer()
            assert (answer.status, answer.error["code"]) == (503, "too_many_connections") and await second.is_closed()
        assert (await first.ask(WHOLE)).status == 200
