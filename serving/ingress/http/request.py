"""One HTTP request of a client: its body, its path, and whether the client is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import ClientGoneError, InvalidRequestError
from serving.ingress.body_bounds import MAX_BODY_BYTES

BODY_TIMEOUT_S = 120.0      # 8 MiB at half a megabit a second
_LENGTH_DIGITS = 20         # of a content-length that are read: more than any body has
T = TypeVar("T")


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
