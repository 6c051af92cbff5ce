"""A form is read in pieces that may end anywhere, and what is none is refused, whatever it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serving.errors import InvalidRequestError
from serving.ingress.batches.files import FormPiece
from serving.ingress.http import form as form_module
from serving.ingress.http.form import read_form

BODY = (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\nline\r\n--bad\r\n\r\n\r\n--b--\r\n")


def request_of(pieces: Sequence[bytes], kind: str = "multipart/form-data; boundary=b") -> Request:
    left = list(pieces)

    async def receive() -> dict[str, object]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}
    return Request({"type": "http", "headers": [(b"content-type", kind.encode())]}, receive)


async def read(pieces: Sequence[bytes], kind: str = "multipart/form-data; boundary=b") -> list[FormPiece]:
    return [piece async for piece in read_form(request_of(pieces, kind))]


@given(st.lists(st.integers(0, len(BODY)), max_size=8).map(sorted))
@example([BODY.rindex(b"-")])           # between the two dashes of the end
async def test_it_reads_the_same_wherever_the_body_is_cut(cuts: list[int]) -> None:
    ends = [0, *cuts, len(BODY)]
    pieces = await read([BODY[start:end] for start, end in zip(ends, ends[1:], strict=False)])
    assert pieces[0] == FormPiece(0, "purpose", None, b"batch")
    assert {piece[:3] for piece in pieces[1:]} == {(1, "file", "a.jsonl")}
    assert b"".join(piece.content for piece in pieces[1:]) == b"line\r\n--bad\r\n\r\n"


@pytest.mark.parametrize(("pieces", "kind"), [
    ([BODY], "application/json"), ([BODY], "multipart/form-data"), ([BODY], "multipart/form-data; boundary="),
    ([BODY], f"multipart/form-data; boundary={'x' * 201}"), ([BODY[:-6]], "multipart/form-data; boundary=b"),
    ([b""], "multipart/form-data; boundary=b"), ([b"\xff" * 100], "multipart/form-data; boundary=b"),
    ([b"x" * 65536] * 4, "multipart/form-data; boundary=b"),        # no beginning
    ([b"--b\r\n", *[b"x: " + b"y" * 65533] * 4], "multipart/form-data; boundary=b"),        # no end of a head
    ([b"--b\r\nx: y\r\n\r\n\r\n--b--"], "multipart/form-data; boundary=b"),
    ([b"--b\r\ncontent-disposition: form-data; name=\"\xff\"\r\n\r\n\r\n--b--"], "multipart/form-data; boundary=b"),
    ([BODY[:-7] * 20], "multipart/form-data; boundary=b"),
    ([b"--b\r\ncontent-disposition: form-data; name=a\r\n\r\n", b"x" * 1025], "multipart/form-data; boundary=b")])
async def test_what_is_no_form_is_refused(pieces: list[bytes], kind: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await read(pieces, kind)
    assert raised.value.fix


async def test_an_empty_file_is_a_file_and_a_part_without_a_name_is_one() -> None:
    head = b"--b\r\ncontent-disposition: form-data%b\r\n\r\n%b\r\n"
    body = head % (b'; name="file"; filename="a"', b"") + head % (b"", b"x") + b"--b--"
    assert await read([body]) == [FormPiece(0, "file", "a", b""), FormPiece(1, "", None, b"x")]


async def test_a_silent_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_module, "_SILENCE_S", 0.0)

    async def stream() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""
    request = request_of([])
    monkeypatch.setattr(request, "stream", stream)
    with pytest.raises(HTTPException) as raised:
        await anext(read_form(request))
    assert raised.value.status_code == 408
