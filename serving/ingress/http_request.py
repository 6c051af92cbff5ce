"""One HTTP request of a client: who asks, under which id, with which body, and whether the client is still there."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TypeGuard, TypeVar
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import ClientGoneError, InvalidRequestError
from serving.ingress.auth import choose_tenant
from serving.ingress.body_bounds import MAX_BODY_BYTES

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
BODY_TIMEOUT_S = 120.0      # 8 MiB at half a megabit a second
_LENGTH_DIGITS = 20         # of a content-length that are read: more than any body has
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    request_id: str
    key_tenant: str | None      # None: no API keys are configured

    def tenant(self, user: str | None) -> str:
        return choose_tenant(self.key_tenant, user)

    def under(self, request_id: str | None) -> Caller:
        """Return the same caller under the id that a body gives, where it gives one that can stand in a log line."""
        return Caller(request_id, self.key_tenant) if is_request_id(request_id) else self


@dataclass(frozen=True, slots=True)
class Stamp:
    """Values that every object of one answer carries."""

    id: str
    created_s: int              # Unix time
    fingerprint: str


def is_request_id(given: str | None) -> TypeGuard[str]:
    """Return whether it can stand in a log line."""
    return given is not None and _REQUEST_ID.fullmatch(given) is not None


def choose_request_id(given: str | None) -> str:
    """Return the client's id, if it can stand in a log line; else a new one."""
    return given if is_request_id(given) else uuid4().hex


async def read_body(request: Request) -> bytes:
    """Return the whole body. Raises HTTPException: 413 as soon as it is too long, 408 when it takes too long, and 415
    when it is compressed."""
    encoding = request.headers.get("content-encoding", "").lower()
    if encoding not in ("", "identity"):
        raise HTTPException(415, f"content-encoding {encoding[:40]!r} is not supported. Send the body uncompressed")
    declared = request.headers.get("content-length", "")
    chunks: list[bytes] = []
    num_bytes = int(declared[:_LENGTH_DIGITS]) if declared.isdecimal() else 0
    if num_bytes <= MAX_BODY_BYTES:
        num_bytes = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > MAX_BODY_BYTES:
                        break
                    chunks.append(chunk)
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {BODY_TIMEOUT_S:g} s. Send it faster",
                                {"connection": "close"}) from None
    if num_bytes > MAX_BODY_BYTES:
        raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes. Send a shorter prompt")
    return b"".join(chunks)


def to_utf8(content: bytes) -> bytes:
    """Return JSON as the UTF-8 that it should be in: without a byte order mark, and from UTF-16 or UTF-32, which some
    clients on Windows write. Raises InvalidRequestError."""
    encoding = json.detect_encoding(content)
    if encoding == "utf-8":
        return content
    try:
        return content.decode(encoding).encode()
    except UnicodeError:        # a half of a pair of UTF-16, or bytes that only looked like it
        raise InvalidRequestError(f"the body looks like {encoding} and is not", fix="send JSON in UTF-8") from None


class PlainPaths:
    """Serve `/v1/models/` as `/v1/models`, for a redirect would lose the body with some clients, and below a prefix
    what is served without it: behind Ray Serve's proxy the prefix is needed, at the door it may be left out."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/",
                     "root_path": scope.get("root_path") or self._prefix}
        await self._app(scope, receive, send)


async def until_disconnect(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """Run `work`; when the client goes away first, cancel it, raise ClientGoneError. The body must have been read."""
    task = asyncio.create_task(work)
    listener = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("the client went away")
    finally:
        task.cancel()
        listener.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
