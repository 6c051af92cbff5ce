"""Serve /v1/files: the pieces of an upload become a stored file, and that its description or its content."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.batches.page import Page
from serving.batches.stored_file import CHUNK_BYTES, Purpose, StoredFile, new_file
from serving.batches.stores import BatchStores
from serving.errors import InvalidRequestError
from serving.ingress.batches.file_types import ExpiresAfter, FileAnswer, FileDeleted, FileForm, FileList, FileQuery
from serving.ingress.build_request import check

_PAGE_CHUNKS = 16           # read at once: 4 MiB of an uploaded file


class FormPiece(NamedTuple):
    """A whole field of a form, or a piece of one of its files."""

    part: int                   # its number in the form
    name: str
    filename: str | None        # None: a field
    content: bytes


@dataclass(slots=True)
class _Upload:
    part: int
    file: StoredFile
    num_bytes: int = 0
    num_chunks: int = 0
    pending: bytearray = field(default_factory=bytearray)       # not yet in a chunk


class FilesEndpoint:
    def __init__(self, stores: BatchStores) -> None:
        self._stores = stores
        self._files = stores.files
        self._thread = stores.thread

    async def upload(self, pieces: AsyncIterator[FormPiece], owner: str) -> FileAnswer:
        """Keep the file of a form. Raises InvalidRequestError, and what the form raises."""
        fields: dict[str, object] = {}
        upload: _Upload | None = None
        try:
            async for piece in pieces:
                if piece.filename is None:
                    _add_field(fields, piece)
                    continue
                if upload is None:
                    upload = await self._begin(piece, owner)
                if piece.part != upload.part:
                    raise InvalidRequestError("the form has more than one file", fix="upload one at a time",
                                              param="file")
                fields[piece.name] = piece.filename
                await self._write(upload, piece.content)
            return await self._complete(upload, check(FileForm, fields))
        except Exception:
            if upload is not None:
                await self._thread.call(lambda: self._files.discard(upload.file.file_id))
            raise

    async def _begin(self, piece: FormPiece, owner: str) -> _Upload:
        file = new_file(owner, piece.filename or "", Purpose.BATCH, time.time(), self._stores.keep_s)
        await self._thread.call(lambda: self._files.begin(file))
        return _Upload(piece.part, file)

    async def _write(self, upload: _Upload, content: bytes, is_last: bool = False) -> None:
        """Write what fills chunks; at the end also the rest."""
        upload.pending += content
        upload.num_bytes += len(content)
        if upload.num_bytes > self._stores.config.max_file_bytes:
            raise InvalidRequestError(f"the file has more than {self._stores.config.max_file_bytes} bytes",
                                      fix="split it", param="file")
        while len(upload.pending) >= CHUNK_BYTES or (is_last and upload.pending):
            chunk, number = bytes(upload.pending[:CHUNK_BYTES]), upload.num_chunks
            del upload.pending[:CHUNK_BYTES]
            upload.num_chunks += 1
            await self._thread.call(lambda: self._files.append(upload.file, number, chunk))     # noqa: B023

    async def _complete(self, upload: _Upload | None, form: FileForm) -> FileAnswer:
        if upload is None:
            raise InvalidRequestError("the form's file has no name", fix="send it with one, as curl -F file=@NAME does",
                                      param="file")
        await self._write(upload, b"", is_last=True)
        keep_s = keep_s_of(form.expires_after, self._stores, "expires_after")
        file = upload.file
        return to_answer(await self._thread.call(lambda: self._files.complete(file, file.created_s + keep_s)))

    async def list(self, query: Mapping[str, str], owner: str) -> FileList:
        """Return a page of the owner's files. Raises InvalidRequestError, NotFoundError."""
        wanted = check(FileQuery, query)
        page = Page(wanted.limit, wanted.after, wanted.order == "desc")
        files, has_more = await self._thread.call(lambda: self._files.list_page(owner, page, wanted.purpose))
        return FileList(data=[to_answer(file) for file in files], has_more=has_more,
                        first_id=files[0].file_id if files else None, last_id=files[-1].file_id if files else None)

    async def get(self, file_id: str, owner: str) -> FileAnswer:
        """Describe a file. Raises NotFoundError."""
        return to_answer(await self._thread.call(lambda: self._files.get(owner, file_id)))

    async def delete(self, file_id: str, owner: str) -> FileDeleted:
        """Forget a file. Raises NotFoundError."""
        await self._thread.call(lambda: self._files.delete(owner, file_id))
        return FileDeleted(id=file_id)

    async def content(self, file_id: str, owner: str) -> tuple[int, AsyncGenerator[bytes]]:
        """Return how many bytes a file has, and these in pieces. Raises NotFoundError."""
        file = await self._thread.call(lambda: self._files.get(owner, file_id))
        return file.num_bytes, self._pieces(file_id)

    async def _pieces(self, file_id: str) -> AsyncGenerator[bytes]:
        first = 0
        while chunks := await self._thread.call(lambda: self._files.chunks(file_id, first, _PAGE_CHUNKS)):  # noqa: B023
            for number, chunk in chunks:
                first = number + 1
                yield chunk


def keep_s_of(asked: ExpiresAfter | None, stores: BatchStores, param: str) -> float:
    """Return how long a file is to be kept. Raises InvalidRequestError for longer than any is."""
    keep_s = stores.keep_s if asked is None else float(asked.seconds)
    if keep_s > stores.keep_s:
        raise InvalidRequestError(f"{param}.seconds={keep_s:.0f} is more than the {stores.keep_s:.0f} that files are "
                                  "kept here", fix="ask for less", param=f"{param}.seconds")
    return keep_s


def to_answer(file: StoredFile) -> FileAnswer:
    return FileAnswer(id=file.file_id, bytes=file.num_bytes, created_at=int(file.created_s),
                      expires_at=int(file.expires_s), filename=file.filename, purpose=file.purpose)


def _add_field(fields: dict[str, object], piece: FormPiece) -> None:
    """Add a field of the form; `expires_after[seconds]` is one of the fields of expires_after."""
    try:
        text = piece.content.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"the field {piece.name[:64]!r} is not UTF-8", fix="encode it so",
                                  param=piece.name[:64]) from None
    name, bracket, inner = piece.name.partition("[")
    if bracket and inner.endswith("]"):
        inside = fields.setdefault(name, {})
        if isinstance(inside, dict):
            inside[inner[:-1]] = text
    else:
        fields[piece.name] = text
