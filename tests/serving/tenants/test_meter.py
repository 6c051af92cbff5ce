"""Requests wait for the book, never for each other's answers, and none is forgotten when the database goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from serving.errors import InvalidRequestError, NotReadyError, OverloadedError, QuotaExceededError
from serving.tenants.database import open_database, reading
from serving.tenants.key import Key, Limits
from serving.tenants.ledger import Ledger, Opening, Outcome, Used
from serving.tenants.meter import Meter, refusal_error
from serving.tenants.schema import REQUESTS
from serving.tenants.standing import Ask, Refusal
from tests.deadlines import PATIENCE_S
from tests.serving.tenants.keys import new_key

NOW = 1.8e9


class Book:
    def __init__(self, folder: Path) -> None:
        self.engine: Engine = open_database(f"sqlite:///{folder}/tenants.db")
        self.thread = ThreadPoolExecutor(1)
        self.meter = Meter(Ledger(self.engine, "r"), self.thread, lambda: NOW)

    def outcomes(self) -> dict[str, str | None]:
        with reading(self.engine) as connection:
            return {row[0]: row[1] for row in connection.execute(select(REQUESTS.c.usage_id, REQUESTS.c.outcome))}

    def run(self, statement: str) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql(statement)


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    made = Book(tmp_path)
    yield made
    made.thread.shutdown()
    made.engine.dispose()


def opening(key: Key, usage_id: str, size: int = 10) -> Opening:
    return Opening(usage_id, usage_id, key, "m", Ask(size, size, size), NOW)


async def test_those_who_come_together_are_written_together(book: Book) -> None:
    key, _ = new_key(limits=Limits(tokens_per_day=25, requests_per_minute=9))
    asked = [asyncio.create_task(book.meter.open(opening(key, str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    assert await book.meter.write()
    first, second, third = await asyncio.gather(*asked, return_exceptions=True)
    assert first == second and isinstance(third, QuotaExceededError)
    assert book.meter.headers(key)["x-ratelimit-remaining-requests"] == "7"
    assert book.meter.headers(new_key()[0]) == {}
    book.meter.progress("0", Used(num_prompt=3))
    book.meter.end("0", key, Outcome.FINISHED, Used(num_prompt=4))
    assert await book.meter.write() and book.outcomes() == {"0": "finished", "1": None}


async def test_while_the_database_is_away_nothing_is_admitted_and_no_end_is_forgotten(book: Book) -> None:
    key, _ = new_key()
    first = asyncio.create_task(book.meter.open(opening(key, "first")))
    await asyncio.sleep(0)
    await book.meter.write()
    await first
    book.run("ALTER TABLE standings RENAME TO away")
    book.meter.end("first", key, Outcome.FINISHED, Used())
    second = asyncio.create_task(book.meter.open(opening(key, "second")))
    await asyncio.sleep(0)
    assert not await book.meter.write()
    with pytest.raises(NotReadyError, match="does not answer"):
        await second
    book.run("ALTER TABLE away RENAME TO standings")
    assert await book.meter.write() and book.outcomes() == {"first": "finished"}


async def test_who_goes_while_it_is_written_is_ended(book: Book) -> None:
    key, _ = new_key()
    asked = asyncio.create_task(book.meter.open(opening(key, "a")))
    await asyncio.sleep(0)
    writing = asyncio.create_task(book.meter.write())
    await asyncio.sleep(0)
    asked.cancel()
    await writing
    await asyncio.gather(asked, return_exceptions=True)
    await book.meter.write()
    assert book.outcomes() == {"a": "cancelled"}


async def test_it_runs_by_itself(book: Book) -> None:
    key, _ = new_key()
    running = asyncio.create_task(book.meter.run())
    async with asyncio.timeout(PATIENCE_S):
        await book.meter.open(opening(key, "a"))
        book.meter.end("a", key, Outcome.FAILED, Used())
        while book.outcomes() != {"a": "failed"}:       # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()


@pytest.mark.parametrize(("limit", "retry_s", "kind"), [
    ("tokens_per_month", 9.0, QuotaExceededError), ("requests_per_minute", 9.0, OverloadedError),
    ("tokens_per_minute", None, InvalidRequestError)])
def test_a_refusal_names_limit_and_key(limit: str, retry_s: float | None, kind: type[Exception]) -> None:
    error = refusal_error(Refusal(limit, 10, 9, retry_s), new_key()[0])
    assert type(error) is kind and f"{limit}=10" in str(error) and "'app'" in str(error)
