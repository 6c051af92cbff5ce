"""Files in the database, as rows of bounded chunks: every router has them, without a disk that routers share.

A file is there once it is complete. Calls wait for the database, each for a bounded piece of work.
"""

from __future__ import annotations

from sqlalchemy import Connection, Engine, RowMapping, delete, func, insert, select, tuple_, update

from serving.batches.batch import OPEN
from serving.batches.page import OBJECT_ID, Page
from serving.batches.stored_file import MAX_FILES, Purpose, StoredFile
from serving.errors import InvalidRequestError, NotFoundError
from serving.tenants.database import reading
from serving.tenants.schema import BATCHES, FILE_CHUNKS, FILES

UPLOAD_S = 3600.0       # an upload that is not complete by then is given up
_NUM_SWEPT = 64         # chunks that one transaction deletes
_FILES_IN_USE = select(BATCHES.c.input_file_id).where(BATCHES.c.status.in_([status.value for status in OPEN]))
_DELETE_FIX = "delete files that are not needed any more"


class FileStore:
    def __init__(self, engine: Engine, max_tenant_bytes: int) -> None:
        self._engine = engine
        self._max_tenant_bytes = max_tenant_bytes

    def begin(self, file: StoredFile) -> None:
        """Make room for a file that will come in chunks. Raises InvalidRequestError when its tenant has too many."""
        with self._engine.begin() as connection:
            num_files = connection.execute(select(func.count()).where(FILES.c.tenant == file.tenant)).scalar_one()
            if num_files >= MAX_FILES:
                raise InvalidRequestError(f"there are {num_files} files, as many as may be", fix=_DELETE_FIX)
            add_file(connection, file)

    def append(self, file: StoredFile, number: int, content: bytes) -> None:
        """Add a chunk. Raises InvalidRequestError when the tenant's files have too many bytes."""
        with self._engine.begin() as connection:
            append_chunk(connection, file.file_id, number, content)
            if bytes_of_tenant(connection, file.tenant) > self._max_tenant_bytes:
                raise InvalidRequestError(f"all files together would have more than {self._max_tenant_bytes} bytes",
                                          fix=_DELETE_FIX, param="file")

    def complete(self, file: StoredFile, expires_s: float) -> StoredFile:
        """Show the file from now on. Raises InvalidRequestError when it came so slowly that it was given up."""
        with self._engine.begin() as connection:
            connection.execute(update(FILES).where(FILES.c.file_id == file.file_id).values(
                is_complete=True, expires_s=expires_s))
            row = connection.execute(select(FILES).where(FILES.c.file_id == file.file_id)).mappings().one_or_none()
        if row is None:
            raise InvalidRequestError(f"the file did not come within {UPLOAD_S:g} s", fix="send it faster",
                                      param="file")
        return _to_file(row)

    def discard(self, file_id: str) -> None:
        """Forget a file. Its chunks go with the next sweeps."""
        with self._engine.begin() as connection:
            connection.execute(delete(FILES).where(FILES.c.file_id == file_id))

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return a complete file of this tenant. Raises NotFoundError."""
        with reading(self._engine) as connection:
            return find_file(connection, tenant, file_id, "file_id")

    def list_page(self, tenant: str, page: Page, purpose: str | None = None) -> tuple[list[StoredFile], bool]:
        """Return a page of the tenant's files, and whether there are more. Raises NotFoundError."""
        query = select(FILES).where(FILES.c.tenant == tenant, FILES.c.is_complete)
        if purpose is not None:
            query = query.where(FILES.c.purpose == purpose)
        with reading(self._engine) as connection:
            start = None if page.after is None else find_file(connection, tenant, page.after, "after")
            place = None if start is None else (start.created_s, start.file_id)
            rows = connection.execute(page.of(query, FILES.c.created_s, FILES.c.file_id, place)).mappings().all()
        return [_to_file(row) for row in rows[:page.limit]], len(rows) > page.limit

    def chunks(self, file_id: str, first: int, num: int) -> list[tuple[int, bytes]]:
        """Return the first chunks from a number on, which may have gaps, with their numbers."""
        query = select(FILE_CHUNKS.c.number, FILE_CHUNKS.c.content).where(
            FILE_CHUNKS.c.file_id == file_id, FILE_CHUNKS.c.number >= first).order_by(FILE_CHUNKS.c.number).limit(num)
        with reading(self._engine) as connection:
            return [(number, bytes(content)) for number, content in connection.execute(query)]

    def delete(self, tenant: str, file_id: str) -> None:
        """Forget a complete file. Raises NotFoundError; InvalidRequestError when an open batch reads it."""
        with self._engine.begin() as connection:
            find_file(connection, tenant, file_id, "file_id")
            if connection.execute(_FILES_IN_USE.where(BATCHES.c.input_file_id == file_id)).first() is not None:
                raise InvalidRequestError(f"the file {file_id} is the input of an open batch", param="file_id",
                                          fix="cancel the batch, or wait for its end")
            connection.execute(delete(FILES).where(FILES.c.file_id == file_id))

    def sweep(self, now_s: float) -> int:
        """Forget what has expired and uploads that were given up, and delete some chunks of files that are forgotten.

        Return how many; call it again until it is none.
        """
        with self._engine.begin() as connection:
            is_late = ~FILES.c.is_complete & (FILES.c.purpose == Purpose.BATCH.value) & (
                FILES.c.created_s < now_s - UPLOAD_S)
            connection.execute(delete(FILES).where(
                (FILES.c.expires_s <= now_s) | is_late, FILES.c.file_id.not_in(_FILES_IN_USE)))
            place = tuple_(FILE_CHUNKS.c.file_id, FILE_CHUNKS.c.number)
            orphans = connection.execute(select(FILE_CHUNKS.c.file_id, FILE_CHUNKS.c.number).where(
                FILE_CHUNKS.c.file_id.not_in(select(FILES.c.file_id))).limit(_NUM_SWEPT)).all()
            if orphans:
                connection.execute(delete(FILE_CHUNKS).where(place.in_([tuple(row) for row in orphans])))
        return len(orphans)


def add_file(connection: Connection, file: StoredFile) -> None:
    """Write the row of a file that is not complete."""
    connection.execute(insert(FILES).values(
        file_id=file.file_id, tenant=file.tenant, filename=file.filename, purpose=file.purpose.value,
        num_bytes=file.num_bytes, created_s=file.created_s, expires_s=file.expires_s, is_complete=False))


def append_chunk(connection: Connection, file_id: str, number: int, content: bytes) -> None:
    """Write one chunk of a file that is not complete."""
    connection.execute(insert(FILE_CHUNKS).values(file_id=file_id, number=number, content=content))
    connection.execute(update(FILES).where(FILES.c.file_id == file_id).values(
        num_bytes=FILES.c.num_bytes + len(content)))


def bytes_of_tenant(connection: Connection, tenant: str) -> int:
    """Return how many bytes all its files have."""
    return int(connection.execute(select(func.coalesce(func.sum(FILES.c.num_bytes), 0)).where(
        FILES.c.tenant == tenant)).scalar_one())


def find_file(connection: Connection, tenant: str, file_id: str, param: str) -> StoredFile:
    """Return a complete file of this tenant. Raises NotFoundError, which does not tell whether others have it."""
    row = connection.execute(select(FILES).where(
        FILES.c.file_id == file_id, FILES.c.tenant == tenant, FILES.c.is_complete)).mappings().one_or_none() \
        if OBJECT_ID.fullmatch(file_id) else None
    if row is None:
        raise NotFoundError(f"there is no file {file_id[:64]!r}", fix="GET /v1/files lists those that there are",
                            param=param)
    return _to_file(row)


def _to_file(row: RowMapping) -> StoredFile:
    return StoredFile(row["file_id"], row["tenant"], row["filename"], Purpose(row["purpose"]), row["num_bytes"],
                      row["created_s"], row["expires_s"])
