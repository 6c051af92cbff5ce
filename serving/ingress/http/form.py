"""A form with a file (multipart/form-data), read piece by piece: whatever it holds, only a piece is kept.

werkzeug's decoder does no input or output of its own, is bounded, and fits any framework.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.exceptions import HTTPException
from starlette.requests import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Event, Field, File, MultipartDecoder, NeedData

from serving.errors import InvalidRequestError
from serving.ingress.batches.files import FormPiece

MAX_PARTS = 16
MAX_FIELD_BYTES = 1024
_MAX_BOUNDARY_CHARACTERS = 200          # RFC 2046 has 70
_MAX_HELD_BYTES = 64
_PIECE_BYTES = 64 * 2**10
_SILENCE_S = 60.0                       # a client that sends nothing for so long is gone


async def read_form(request: Request) -> AsyncGenerator[FormPiece]:
    """Yield fields as a whole and files in pieces, also of an empty one. Raises InvalidRequestError, HTTPException."""
    boundary = _boundary(request)
    decoder = MultipartDecoder(boundary, 2 * _PIECE_BYTES, max_parts=MAX_PARTS)
    part, name, filename, field = -1, "", None, bytearray()
    async for event in _events(_held_back(_pieces(request), boundary), decoder):
        if isinstance(event, (Field, File)):
            part, name, field = part + 1, event.name or "", bytearray()
            filename = event.filename if isinstance(event, File) else None
        elif isinstance(event, Data) and filename is not None:
            yield FormPiece(part, name, filename, event.data)
        elif isinstance(event, Data):
            field += event.data
            if len(field) > MAX_FIELD_BYTES:
                raise InvalidRequestError(f"the field {name[:64]!r} has more than {MAX_FIELD_BYTES} bytes",
                                          fix="shorten it", param=name[:64])
            if not event.more_data:
                yield FormPiece(part, name, None, bytes(field))


async def _events(pieces: AsyncIterator[bytes], decoder: MultipartDecoder) -> AsyncIterator[Event]:
    try:
        async for piece in pieces:
            decoder.receive_data(piece)
            while not isinstance(event := decoder.next_event(), NeedData):
                yield event
        decoder.receive_data(None)
        decoder.next_event()            # raises where the end is missing
    except RequestEntityTooLarge:
        raise InvalidRequestError(f"the form has more than {MAX_PARTS} parts, or a head of a part that is too long",
                                  fix="send the fields that are documented and one file") from None
    except ValueError:
        raise InvalidRequestError("the body is no whole multipart/form-data",
                                  fix="send it as curl -F or the client library does") from None


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                body = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise HTTPException(408, f"nothing of the body came for {_SILENCE_S:g} s. Send it faster",
                                {"connection": "close"}) from None
        for start in range(0, len(body), _PIECE_BYTES):
            yield body[start:start + _PIECE_BYTES]


async def _held_back(pieces: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[bytes]:
    """Yield the same in pieces that do not end between a boundary and the end of its line: of such a piece the decoder
    would take the line break before the boundary for content."""
    begun = re.compile(b"--" + re.escape(boundary) + rb"([- \t]+)\Z")
    before = held = b""
    async for piece in pieces:
        whole = held + piece
        found = begun.search((before + whole)[-len(boundary) - _MAX_HELD_BYTES:])
        held = b"" if found is None else found[1]
        whole = whole[:len(whole) - len(held)]
        before = (before + whole)[-len(boundary) - 2:]
        yield whole
    yield held


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not 0 < len(boundary) <= _MAX_BOUNDARY_CHARACTERS:
        raise InvalidRequestError("the body is no multipart/form-data with a boundary",
                                  fix="send a form with the fields purpose and file, as curl -F does")
    return boundary.encode()
