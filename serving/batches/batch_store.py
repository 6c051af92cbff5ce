"""Batches in the database: what clients do with them, and their way from one status to the next.

Any router may take the next step of any batch: each is one bounded transaction that holds the batch's row and looks
first whether it is still to be done. Calls wait for the database.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, Select, delete, func, insert, or_, select, update

from serving.batches.batch import (
    NEXT,
    OPEN,
    Batch,
    BatchFault,
    BatchStatus,
    LineEntry,
    LineOutcome,
    TokenCounts,
    unanswered_line,
)
from serving.batches.file_store import add_file, append_chunk, bytes_of_tenant, find_file
from serving.batches.page import OBJECT_ID, Page
from serving.batches.stored_file import Purpose, StoredFile
from serving.errors import InvalidRequestError, NotFoundError
from serving.tenants.database import reading
from serving.tenants.ledger import LEASE_S
from serving.tenants.schema import BATCH_LINES, BATCHES, FILES, ROUTERS

MAX_OPEN_BATCHES = 100      # of one tenant
_NUM_AT_ONCE = 500          # lines that one transaction gives up or deletes
_IS_OPEN = BATCHES.c.status.in_([status.value for status in OPEN])


class BatchStore:
    def __init__(self, engine: Engine, max_tenant_bytes: int) -> None:
        self._engine = engine
        self._max_tenant_bytes = max_tenant_bytes

    def create(self, batch: Batch, outputs: tuple[StoredFile, StoredFile]) -> None:
        """Keep a new batch, and the two files that it will write. Raises NotFoundError, InvalidRequestError."""
        with self._engine.begin() as connection:
            file = find_file(connection, batch.tenant, batch.input_file_id, "input_file_id")
            if file.purpose is not Purpose.BATCH:
                raise InvalidRequestError(f"the file {file.file_id} is the output of a batch", param="input_file_id",
                                          fix="give a file that was uploaded with purpose batch")
            num_open = connection.execute(select(func.count()).where(
                BATCHES.c.tenant == batch.tenant, _IS_OPEN)).scalar_one()
            if num_open >= MAX_OPEN_BATCHES:
                raise InvalidRequestError(f"{num_open} batches are open, as many as may be",
                                          fix="wait until one has ended, or cancel one")
            num_bytes = bytes_of_tenant(connection, batch.tenant)
            if num_bytes >= self._max_tenant_bytes:
                raise InvalidRequestError(f"the files have {num_bytes} bytes, as many as they may",
                                          fix="delete some: a batch writes more")
            connection.execute(insert(BATCHES).values(_row_of(batch)))
            for output in outputs:
                add_file(connection, output)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Return a batch of this tenant. Raises NotFoundError."""
        with reading(self._engine) as connection:
            return _find(connection, tenant, batch_id, "batch_id")

    def list_page(self, tenant: str, page: Page) -> tuple[list[Batch], bool]:
        """Return a page of the tenant's batches, and whether there are more. Raises NotFoundError."""
        with reading(self._engine) as connection:
            start = None if page.after is None else _find(connection, tenant, page.after, "after")
            place = None if start is None else (start.created_s, start.batch_id)
            query = page.of(select(BATCHES).where(BATCHES.c.tenant == tenant), BATCHES.c.created_s,
                            BATCHES.c.batch_id, place)
            rows = connection.execute(query).mappings().all()
        return [to_batch(row) for row in rows[:page.limit]], len(rows) > page.limit

    def cancel(self, tenant: str, batch_id: str, now_s: float) -> Batch:
        """Take no more of its lines. Raises NotFoundError; InvalidRequestError when it is about to end, or has."""
        with self._engine.begin() as connection:
            _find(connection, tenant, batch_id, "batch_id")
            batch = locked(connection, batch_id)
            if batch is None or batch.status is BatchStatus.CANCELLING:
                return _find(connection, tenant, batch_id, "batch_id")
            if BatchStatus.CANCELLING not in NEXT.get(batch.status, ()):
                raise InvalidRequestError(f"the batch {batch_id} is {batch.status} and cannot be cancelled",
                                          fix="only one that is validating or in_progress can", param="batch_id")
            return move(connection, batch, BatchStatus.CANCELLING, now_s)

    # What routers do.

    def due(self, now_s: float) -> list[str]:
        """Return the batches for which `advance` has something to do."""
        has_open_lines = select(BATCH_LINES.c.number).where(
            BATCH_LINES.c.batch_id == BATCHES.c.batch_id, BATCH_LINES.c.outcome.is_(None)).exists()
        ended = (BATCHES.c.status == BatchStatus.IN_PROGRESS.value) & ((BATCHES.c.expires_s <= now_s) | ~has_open_lines)
        ending = BATCHES.c.status.in_([BatchStatus.FINALIZING.value, BatchStatus.CANCELLING.value])
        with reading(self._engine) as connection:
            return list(connection.execute(select(BATCHES.c.batch_id).where(or_(ended, ending))
                                           .order_by(BATCHES.c.created_s)).scalars())

    def advance(self, batch_id: str, now_s: float) -> bool:
        """Take one step towards the batch's end. Return whether there is another to be taken at once."""
        with self._engine.begin() as connection:
            batch = locked(connection, batch_id)
            if batch is None:
                return False
            if batch.status is BatchStatus.IN_PROGRESS and (
                    batch.expires_s <= now_s or not _open_lines(connection, batch_id, 1)):
                move(connection, batch, BatchStatus.FINALIZING, now_s)
                return True
            if batch.status is BatchStatus.FINALIZING:
                if late := _open_lines(connection, batch_id, _NUM_AT_ONCE):
                    _leave(connection, batch, late, LineOutcome.EXPIRED)
                    return True
                _show_files(connection, batch)
                move(connection, batch, _end_of(connection, batch_id), now_s)
            elif batch.status is BatchStatus.CANCELLING:
                left = _open_lines(connection, batch_id, _NUM_AT_ONCE, _is_nobodys(now_s))
                if left and batch.num_total:        # it was validated: all its lines are known
                    _leave(connection, batch, left, LineOutcome.CANCELLED)
                    return True
                if not _open_lines(connection, batch_id, 1, ~_is_nobodys(now_s)):
                    _show_files(connection, batch)
                    move(connection, batch, BatchStatus.CANCELLED, now_s)
        return False

    def take_for_validation(self, router_id: str, now_s: float) -> Batch | None:
        """Return the oldest batch that nobody who lives validates. Lines that another had found in it are forgotten."""
        is_free = or_(BATCHES.c.router_id.is_(None), BATCHES.c.router_id == router_id,
                      BATCHES.c.router_id.not_in(living(now_s)))
        found = select(BATCHES.c.batch_id).where(BATCHES.c.status == BatchStatus.VALIDATING.value, is_free).order_by(
            BATCHES.c.created_s).limit(1)
        with reading(self._engine) as connection:
            if (batch_id := connection.execute(found).scalar_one_or_none()) is None:
                return None
        with self._engine.begin() as connection:
            batch = locked(connection, batch_id)
            if batch is None or connection.execute(found.where(BATCHES.c.batch_id == batch_id)).first() is None:
                return None
            connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch_id).values(router_id=router_id))
            connection.execute(delete(BATCH_LINES).where(BATCH_LINES.c.batch_id == batch_id))
            return batch

    def add_lines(self, batch_id: str, router_id: str, entries: list[LineEntry]) -> bool:
        """Keep lines of a batch that this router validates. Return whether it still does."""
        with self._engine.begin() as connection:
            if not _validates(connection, batch_id, router_id):
                return False
            if entries:
                connection.execute(insert(BATCH_LINES), [
                    asdict(entry) | {"batch_id": batch_id, "num_tries": 0} for entry in entries])
        return True

    def validated(self, batch_id: str, router_id: str, model: str | None, faults: list[BatchFault], now_s: float
                  ) -> bool:
        """End the validation: the batch fails when there are faults, else its lines may be taken. Return whether this
        router still validated it."""
        with self._engine.begin() as connection:
            batch = locked(connection, batch_id)
            if batch is None or not _validates(connection, batch_id, router_id):
                return False
            if faults:
                connection.execute(delete(FILES).where(
                    FILES.c.file_id.in_([batch.output_file_id, batch.error_file_id])))
                connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch_id).values(
                    errors=[asdict(fault) for fault in faults]))
                move(connection, batch, BatchStatus.FAILED, now_s)
                return True
            num_total = connection.execute(select(func.count()).where(
                BATCH_LINES.c.batch_id == batch_id)).scalar_one()
            connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch_id).values(
                num_total=num_total, model=model, router_id=None))
            move(connection, batch, BatchStatus.IN_PROGRESS, now_s)
        return True

    def sweep(self, now_s: float, keep_s: float) -> int:
        """Forget batches that were made `keep_s` ago, and some lines of those that have ended or are forgotten.

        Return how many; call it again until it is none.
        """
        with self._engine.begin() as connection:
            connection.execute(delete(BATCHES).where(BATCHES.c.created_s <= now_s - keep_s, ~_IS_OPEN))
            is_of_open = BATCH_LINES.c.batch_id.in_(select(BATCHES.c.batch_id).where(_IS_OPEN))
            old = connection.execute(select(BATCH_LINES.c.batch_id, BATCH_LINES.c.number).where(~is_of_open).limit(
                _NUM_AT_ONCE)).all()
            for batch_id in {row[0] for row in old}:
                numbers = [row[1] for row in old if row[0] == batch_id]
                connection.execute(delete(BATCH_LINES).where(
                    BATCH_LINES.c.batch_id == batch_id, BATCH_LINES.c.number.in_(numbers)))
        return len(old)


def living(now_s: float) -> Select[tuple[str]]:
    """Return the query for the routers that live."""
    return select(ROUTERS.c.router_id).where(ROUTERS.c.seen_s >= now_s - LEASE_S)


def locked(connection: Connection, batch_id: str) -> Batch | None:
    """Return the batch, which nobody else may change until the transaction ends; None when it is gone."""
    row = connection.execute(select(BATCHES).where(BATCHES.c.batch_id == batch_id).with_for_update()
                             ).mappings().one_or_none()
    return None if row is None else to_batch(row)


def move(connection: Connection, batch: Batch, to: BatchStatus, now_s: float) -> Batch:
    """Write that a batch, which must be locked, has another status now."""
    assert to in NEXT[batch.status], f"{batch.batch_id}: {batch.status} -> {to}"
    times_s = {**batch.times_s, to.value: now_s}
    connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch.batch_id).values(
        status=to.value, times_s=times_s))
    return replace(batch, status=to, times_s=times_s)


def to_batch(row: RowMapping) -> Batch:
    return Batch(
        row["batch_id"], row["tenant"], row["key_id"], row["endpoint"], row["input_file_id"], row["output_file_id"],
        row["error_file_id"], row["created_s"], row["expires_s"], row["labels"], BatchStatus(row["status"]),
        row["times_s"], tuple(BatchFault(**fault) for fault in row["errors"]), row["model"], row["num_total"],
        row["num_completed"], row["num_failed"],
        TokenCounts(row["num_prompt"], row["num_cached"], row["num_generated"], row["num_reasoning"]))


def _row_of(batch: Batch) -> dict[str, object]:
    row = {column.name: getattr(batch, column.name) for column in BATCHES.columns if hasattr(batch, column.name)}
    return row | asdict(batch.tokens) | {"status": batch.status.value, "errors": [], "taken_s": 0.0, "retry_s": 0.0}


def _find(connection: Connection, tenant: str, batch_id: str, param: str) -> Batch:
    row = connection.execute(select(BATCHES).where(
        BATCHES.c.batch_id == batch_id, BATCHES.c.tenant == tenant)).mappings().one_or_none() \
        if OBJECT_ID.fullmatch(batch_id) else None
    if row is None:
        raise NotFoundError(f"there is no batch {batch_id[:64]!r}", fix="GET /v1/batches lists those that there are",
                            param=param)
    return to_batch(row)


def _validates(connection: Connection, batch_id: str, router_id: str) -> bool:
    return connection.execute(select(BATCHES.c.batch_id).where(
        BATCHES.c.batch_id == batch_id, BATCHES.c.router_id == router_id,
        BATCHES.c.status == BatchStatus.VALIDATING.value).with_for_update()).first() is not None


def _open_lines(connection: Connection, batch_id: str, num: int, *which: ColumnElement[bool]
                ) -> list[tuple[int, str]]:
    """Return number and custom_id of the first lines without an outcome."""
    return [(row[0], row[1]) for row in connection.execute(
        select(BATCH_LINES.c.number, BATCH_LINES.c.custom_id).where(
            BATCH_LINES.c.batch_id == batch_id, BATCH_LINES.c.outcome.is_(None), *which
        ).order_by(BATCH_LINES.c.number).limit(num))]


def _is_nobodys(now_s: float) -> ColumnElement[bool]:
    """Return the condition that no router that lives has a line."""
    return or_(BATCH_LINES.c.router_id.is_(None), BATCH_LINES.c.router_id.not_in(living(now_s)))


def _leave(connection: Connection, batch: Batch, lines: list[tuple[int, str]], outcome: LineOutcome) -> None:
    """Give lines up: the error file says of each why."""
    content = b"".join(unanswered_line(batch.batch_id, *line, outcome) for line in lines)
    append_chunk(connection, batch.error_file_id, lines[0][0], content)
    connection.execute(update(BATCH_LINES).where(
        BATCH_LINES.c.batch_id == batch.batch_id, BATCH_LINES.c.number.in_([number for number, _ in lines])
    ).values(outcome=outcome.value))
    connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch.batch_id).values(
        num_failed=BATCHES.c.num_failed + len(lines)))


def _end_of(connection: Connection, batch_id: str) -> BatchStatus:
    is_late = connection.execute(select(BATCH_LINES.c.number).where(
        BATCH_LINES.c.batch_id == batch_id, BATCH_LINES.c.outcome == LineOutcome.EXPIRED.value).limit(1)).first()
    return BatchStatus.COMPLETED if is_late is None else BatchStatus.EXPIRED


def _show_files(connection: Connection, batch: Batch) -> None:
    """Complete the files that the batch has written. One that is empty is none."""
    ids = [batch.output_file_id, batch.error_file_id]
    connection.execute(delete(FILES).where(FILES.c.file_id.in_(ids), FILES.c.num_bytes == 0))
    connection.execute(update(FILES).where(FILES.c.file_id.in_(ids)).values(is_complete=True))
