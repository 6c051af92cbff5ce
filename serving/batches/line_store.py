"""Lines of batches in the database: taken by routers with room, and answered once, whoever computes them.

A line is its router's as long as that beats (serving/tenants/ledger.py): of one that does not live any more others
take it. Two may compute one line then; whose answer is written first counts. Calls wait for the database.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Engine, and_, or_, select, true, tuple_, update

from serving.batches.batch import BatchStatus, Line, LineEntry, LineOutcome, TokenCounts
from serving.batches.batch_store import living, locked
from serving.batches.file_store import append_chunk, bytes_of_tenant
from serving.batches.stored_file import CHUNK_BYTES
from serving.errors import InvalidRequestError
from serving.tenants.database import reading
from serving.tenants.schema import BATCH_LINES, BATCHES, FILE_CHUNKS

Place = tuple[str, int]         # a line's batch and number


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What is written of a line: one line of the output file, or of the error file."""

    content: bytes
    is_error: bool
    tokens: TokenCounts = TokenCounts()


class LineStore:
    def __init__(self, engine: Engine, router_id: str, max_tenant_bytes: int) -> None:
        self._engine = engine
        self._router_id = router_id
        self._max_tenant_bytes = max_tenant_bytes

    def take(self, held: Collection[Place], num: int, now_s: float) -> list[Line]:
        """Return up to so many lines, which are this router's now, of batches in turn. `held`: those that it has."""
        with reading(self._engine) as connection:
            batch_ids = list(connection.execute(select(BATCHES.c.batch_id).where(
                self._gives(now_s), select(BATCH_LINES.c.number).where(
                    BATCH_LINES.c.batch_id == BATCHES.c.batch_id, self._is_free(held, now_s)).exists()
            ).order_by(BATCHES.c.taken_s, BATCHES.c.batch_id).limit(num)).scalars())
        taken: list[Line] = []
        for index, batch_id in enumerate(batch_ids):
            share = -(-(num - len(taken)) // (len(batch_ids) - index))
            taken += self._take(batch_id, held, share, now_s)
        return taken

    def not_wanted(self, batch_ids: Collection[str], now_s: float) -> set[str]:
        """Return those of the batches whose lines need not be answered any more."""
        with reading(self._engine) as connection:
            wanted = connection.execute(select(BATCHES.c.batch_id).where(
                BATCHES.c.batch_id.in_(batch_ids), BATCHES.c.status == BatchStatus.IN_PROGRESS.value,
                BATCHES.c.expires_s > now_s)).scalars()
            return set(batch_ids) - set(wanted)

    def read(self, line: Line) -> bytes:
        """Return the line as it stands in the input file."""
        entry, chunks = line.entry, FILE_CHUNKS.c
        first, last = entry.first_byte // CHUNK_BYTES, (entry.first_byte + entry.num_bytes - 1) // CHUNK_BYTES
        with reading(self._engine) as connection:
            found = connection.execute(select(chunks.content).where(
                chunks.file_id == line.batch.input_file_id, chunks.number.between(first, last)
            ).order_by(chunks.number)).scalars()
            content = b"".join(bytes(chunk) for chunk in found)
        start = entry.first_byte - first * CHUNK_BYTES
        return content[start:start + entry.num_bytes]

    def finish(self, line: Line, answer: LineAnswer) -> bool:
        """Write the answer. Return False when the line has one already, or its batch has ended.

        Raises InvalidRequestError when the tenant's files would have too many bytes; an error is written all the same.
        """
        batch_id, number = line.place
        with self._engine.begin() as connection:
            batch = locked(connection, batch_id)
            if batch is None or batch.status not in (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING):
                return False
            outcome = LineOutcome.FAILED if answer.is_error else LineOutcome.COMPLETED
            done = connection.execute(update(BATCH_LINES).where(
                BATCH_LINES.c.batch_id == batch_id, BATCH_LINES.c.number == number, BATCH_LINES.c.outcome.is_(None)
            ).values(outcome=outcome.value))
            if done.rowcount == 0:
                return False
            append_chunk(connection, batch.error_file_id if answer.is_error else batch.output_file_id, number,
                         answer.content)
            if not answer.is_error and bytes_of_tenant(connection, batch.tenant) > self._max_tenant_bytes:
                raise InvalidRequestError(f"all files together would have more than {self._max_tenant_bytes} bytes",
                                          fix="delete files that are not needed any more")
            connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch_id).values(_added(answer)))
        return True

    def give_back(self, line: Line, is_try: bool, retry_s: float) -> None:
        """Let anybody take the line, and its batch's others, from `retry_s` on."""
        batch_id, number = line.place
        with self._engine.begin() as connection:
            self._free(connection, [line.place], is_try)
            connection.execute(update(BATCHES).where(
                BATCHES.c.batch_id == batch_id, BATCHES.c.retry_s < retry_s).values(retry_s=retry_s))

    def free(self, places: Collection[Place]) -> None:
        """Let anybody take these lines at once."""
        with self._engine.begin() as connection:
            self._free(connection, places, is_try=False)

    def _free(self, connection: Connection, places: Collection[Place], is_try: bool) -> None:
        connection.execute(update(BATCH_LINES).where(
            tuple_(BATCH_LINES.c.batch_id, BATCH_LINES.c.number).in_(list(places)),
            BATCH_LINES.c.router_id == self._router_id, BATCH_LINES.c.outcome.is_(None)
        ).values(router_id=None, num_tries=BATCH_LINES.c.num_tries + int(is_try)))

    def _take(self, batch_id: str, held: Collection[Place], num: int, now_s: float) -> list[Line]:
        with self._engine.begin() as connection:
            batch = locked(connection, batch_id)
            gives = connection.execute(select(BATCHES.c.batch_id).where(
                BATCHES.c.batch_id == batch_id, self._gives(now_s))).first()
            if batch is None or gives is None:
                return []
            rows = connection.execute(select(BATCH_LINES).where(
                BATCH_LINES.c.batch_id == batch_id, self._is_free(held, now_s)
            ).order_by(BATCH_LINES.c.number).limit(num)).mappings().all()
            connection.execute(update(BATCH_LINES).where(
                BATCH_LINES.c.batch_id == batch_id, BATCH_LINES.c.number.in_([row["number"] for row in rows])
            ).values(router_id=self._router_id))
            connection.execute(update(BATCHES).where(BATCHES.c.batch_id == batch_id).values(taken_s=now_s))
        return [Line(batch, LineEntry(row["number"], row["custom_id"], row["first_byte"], row["num_bytes"]),
                     row["num_tries"]) for row in rows]

    def _gives(self, now_s: float) -> ColumnElement[bool]:
        """Return the condition that lines of a batch may be taken."""
        return and_(BATCHES.c.status == BatchStatus.IN_PROGRESS.value, BATCHES.c.retry_s <= now_s,
                    BATCHES.c.expires_s > now_s)

    def _is_free(self, held: Collection[Place], now_s: float) -> ColumnElement[bool]:
        """Return the condition that a line is nobody's who lives; of this router's own: that it does not know of it."""
        is_free = or_(BATCH_LINES.c.router_id.is_(None), BATCH_LINES.c.router_id == self._router_id,
                      BATCH_LINES.c.router_id.not_in(living(now_s)))
        place = tuple_(BATCH_LINES.c.batch_id, BATCH_LINES.c.number)
        return and_(BATCH_LINES.c.outcome.is_(None), is_free, place.not_in(list(held)) if held else true())


def _added(answer: LineAnswer) -> dict[str, object]:
    """Return what an answer adds to its batch."""
    tokens, columns = answer.tokens, BATCHES.c
    return {
        "num_completed": columns.num_completed + int(not answer.is_error),
        "num_failed": columns.num_failed + int(answer.is_error),
        "num_prompt": columns.num_prompt + tokens.num_prompt, "num_cached": columns.num_cached + tokens.num_cached,
        "num_generated": columns.num_generated + tokens.num_generated,
        "num_reasoning": columns.num_reasoning + tokens.num_reasoning}
