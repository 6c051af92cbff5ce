"""One connection to a router's own HTTP door: uvicorn's protocol, with the bounds that it leaves to a proxy before it.

Its parser is httptools, which knows no bounds and stops at the offer of another protocol (`Upgrade: h2c`, as Java's
client and `curl --http2` send it, or `websocket`). Here a head has a size and a time, a queue of requests has a length,
a client that takes nothing loses its connection, and an offer is not taken up: the request is served as HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus
from uuid import uuid4

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serving.ingress.http.event_stream import WRITE_NOW
from serving.ingress.openai.answers import ErrorAnswer, ErrorDetail

MAX_HEAD_BYTES = 64 * 2**10     # request line and headers; likewise whatever is not yet a part of a body
MAX_HEADERS = 256
MAX_PIPELINED = 16              # requests that one connection may have sent before the first is answered
HEAD_TIMEOUT_S = 30.0           # of a head from its first byte, of the first one from the connection's beginning
KEEP_ALIVE_S = 90.0             # without a request; longer than load balancers keep a connection, so that they end it
STALLED_S = 60.0                # a client that takes nothing of its answer for so long is gone
LINGER_S = 5.0                  # a refused client has so long to read why, before what it still sends resets it
_CODES = {HTTPStatus.BAD_REQUEST: "invalid_http", HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
          HTTPStatus.REQUEST_TIMEOUT: "request_timeout", HTTPStatus.SERVICE_UNAVAILABLE: "too_many_connections",
          HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "headers_too_large"}


class DoorState(ServerState):
    """What the connections of one door share."""

    def __init__(self, max_connections: int) -> None:
        super().__init__()
        self.max_connections = max_connections
        self.is_ending = False      # every answer is its connection's last


class BoundedProtocol(HttpToolsProtocol):
    """Made by the door for each connection. Its methods are called by the event loop, or by the parser within one."""

    server_state: DoorState

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._num_unread_bytes = 0          # since a part of a message was complete
        self._num_headers = self._num_header_bytes = 0
        self._is_in_head = self._is_offer = self._keeps_alive = False
        self._is_refused = False            # nothing more is read
        self._stall_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)
        if len(self.connections) > self.server_state.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "this router has too many connections. Try again")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._stop_stall_timer()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._num_unread_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0]:])
            return
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request")
            return
        if self._num_unread_bytes > MAX_HEAD_BYTES:
            self._refuse_size()
        elif self._head_timer is None and self.cycle is not None and self.cycle.response_complete:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_headers = self._num_header_bytes = 0
        self._is_in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return                          # behind a body in chunks; nothing here has a meaning
        self._num_headers += 1
        self._num_header_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        if self._is_refused:
            return
        if self._num_headers > MAX_HEADERS or len(self.url) + self._num_header_bytes > MAX_HEAD_BYTES:
            self._refuse_size()
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "wait for answers before the next request")
            return
        self._num_unread_bytes = 0
        self._is_offer = self.parser.should_upgrade()
        if self._is_offer:
            return
        self.server_state.default_headers = _date_header(int(time.time()))
        super().on_headers_complete()
        self._keeps_alive = self.cycle.keep_alive and not self.server_state.is_ending
        self.cycle.keep_alive = self._keeps_alive and not self.expect_100_continue      # unasked, no body may come
        self.scope["extensions"] = {WRITE_NOW: {"write": partial(_write_now, self.cycle)}}     # before the app's turn

    def on_body(self, body: bytes) -> None:
        self._num_unread_bytes = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unread_bytes = 0
        if self._is_offer or self._is_refused:
            return
        cycle = self.cycle
        if self.expect_100_continue:
            cycle.keep_alive = self._keeps_alive and not self.server_state.is_ending
        if not cycle.response_complete:
            super().on_message_complete()
            return
        cycle.more_body = False             # the rest of a body that was answered unread
        self._stop_head_timer()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    # Refusals.

    def _decline(self, rest: bytes) -> None:
        """Parse the head again without its offer: the parser has skipped the body for it."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "this is no proxy")
            return
        head = [b"%s %s HTTP/%s\r\n" % (method, self.url, version)]
        head += [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)     # as uvicorn does
        self.data_received(b"".join((*head, b"\r\n", rest)))

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"no request came within {HEAD_TIMEOUT_S:g} s")

    def _refuse_size(self) -> None:
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                     f"the headers have more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} lines")

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Read nothing more, and say why, unless earlier requests wait for their answers: then these are the last."""
        if self._is_refused:
            return
        self._is_refused = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False
            if cycle.response_started or not cycle.more_body or self.pipeline:
                return
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write(_refusal(status, message))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._head_timer = self.loop.call_later(LINGER_S, self.transport.close)
        else:                               # TLS
            self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _write_now(cycle: RequestResponseCycle, body: bytes) -> bool:
    """Write a piece of a started body of unknown length. False: send() must wait for the client, or it is gone."""
    if not cycle.chunked_encoding or cycle.flow.write_paused or cycle.disconnected or cycle.response_complete:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


@lru_cache(maxsize=1)
def _date_header(second: int) -> list[tuple[bytes, bytes]]:
    return [(b"date", formatdate(second, usegmt=True).encode())]


def _refusal(status: HTTPStatus, message: str) -> bytes:
    """Return the whole answer to what is no request of the API, in the API's shape."""
    detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code=_CODES[status])
    content = ErrorAnswer(error=detail).model_dump_json().encode()
    return b"".join((STATUS_LINE[status], b"content-type: application/json\r\ncontent-length: %d\r\n" % len(content),
                     b"x-request-id: %s\r\nconnection: close\r\n\r\n" % uuid4().hex.encode(), content))
