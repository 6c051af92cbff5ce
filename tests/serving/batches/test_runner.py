"""Routers compute the lines of a batch: through restarts, errors, cancellation and expiry each is answered once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import OperationalError

from serving.batches import runner as runner_module
from serving.batches.batch import MAX_TRIES, WINDOW_S, Batch, BatchStatus, Line
from serving.batches.line_store import LineAnswer
from serving.batches.runner import BatchRunner
from serving.batches.stores import BatchStores
from serving.batches.validation import LineHead
from serving.config import BatchConfig
from serving.errors import InvalidRequestError, NotReadyError, OverloadedError, ServingError, ShardFailedError
from serving.metrics import BatchMetrics
from serving.tenants.database import open_database
from serving.tenants.ledger import LEASE_S, Ledger
from tests.serving.batches.batch_tools import NOW_S, content_of, new_batch


@dataclass
class FakeWork:
    """Answers a line by its own text; `errors` are raised one by one first; `stalls` has it wait."""

    errors: list[Exception] = field(default_factory=list)
    stalls: bool = False
    asked: Counter[str] = field(default_factory=Counter)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self, content: bytes, endpoint: str) -> LineHead:
        if content == b"!":
            raise InvalidRequestError("wrong", fix="mend it")
        return LineHead(content.decode(), "tiny")

    async def answer(self, line: Line, content: bytes) -> LineAnswer:
        self.asked[content.decode()] += 1
        self.started.set()
        if self.stalls:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop(0)
        return LineAnswer(content + b"\n", is_error=False)

    def refusal(self, line: Line, error: Exception) -> LineAnswer:
        return LineAnswer(f"{line.entry.custom_id}: {error}\n".encode(), is_error=True)


class House:
    """A database, a clock, and the routers on it."""

    def __init__(self, folder: Path) -> None:
        self.engine = open_database(f"sqlite:///{folder}/tenants.db")
        self.now_s = NOW_S
        self.has_room = True

    def stores(self, router_id: str) -> BatchStores:
        self.beat(router_id)
        return BatchStores(self.engine, router_id, BatchConfig(max_concurrent=2))

    def beat(self, router_id: str) -> None:
        Ledger(self.engine, router_id).beat(self.now_s, [])

    def runner(self, stores: BatchStores, work: FakeWork) -> BatchRunner:
        return BatchRunner(stores, work, lambda: self.has_room, lambda: self.now_s, BatchMetrics(CollectorRegistry()))

    @asynccontextmanager
    async def running(self, stores: BatchStores, work: FakeWork) -> AsyncIterator[None]:
        task = asyncio.create_task(self.runner(stores, work).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(runner_module, "POLL_S", 0.005)
    return House(tmp_path)


async def until(stores: BatchStores, batch: Batch, is_so: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(120):
        while True:
            found = await stores.thread.call(lambda: stores.batches.get(batch.tenant, batch.batch_id))
            if is_so(found):
                return found


def has(status: BatchStatus) -> Callable[[Batch], bool]:
    return lambda batch: batch.status is status


def lines_of(stores: BatchStores, file_id: str) -> list[str]:
    return content_of(stores, file_id).decode().split("\n")[:-1]


async def test_every_line_is_answered_in_its_place(house: House) -> None:
    stores, work = house.stores("one"), FakeWork()
    batch = new_batch(stores, *"abcde")
    async with house.running(stores, work):
        done = await until(stores, batch, has(BatchStatus.COMPLETED))
    assert (done.num_total, done.num_completed, done.num_failed, done.model) == (5, 5, 0, "tiny")
    assert lines_of(stores, batch.output_file_id) == list("abcde") and max(work.asked.values()) == 1


async def test_a_file_with_faults_fails_its_batch_and_a_fault_of_ours_too(house: House) -> None:
    stores, work = house.stores("one"), FakeWork()
    wrong = new_batch(stores, "a", "!")
    async with house.running(stores, work):
        failed = await until(stores, wrong, has(BatchStatus.FAILED))
        assert failed.errors[0].line == 2 and not work.asked

        def break_down(content: bytes, endpoint: str) -> LineHead:
            raise RuntimeError("our own")
        work.check = break_down     # type: ignore[method-assign]
        failed = await until(stores, new_batch(stores, "a"), has(BatchStatus.FAILED))
        assert failed.errors[0].code == "internal_error" and "our own" not in failed.errors[0].message


async def test_after_a_restart_only_what_is_left_is_computed(house: House) -> None:
    stores, first = house.stores("one"), FakeWork()
    batch = new_batch(stores, *"abcdef")
    async with house.running(stores, first):
        await until(stores, batch, lambda found: found.num_completed >= 2)
    again, second = house.stores("two"), FakeWork()
    async with house.running(again, second):
        await until(again, batch, has(BatchStatus.COMPLETED))
    assert lines_of(again, batch.output_file_id) == list("abcdef")


async def test_lines_of_a_router_that_was_killed_go_on_when_it_does_not_beat_any_more(house: House) -> None:
    dead, living = house.stores("dead"), house.stores("living")
    batch = new_batch(dead, *"abc")
    async with house.running(dead, FakeWork()):
        await until(dead, batch, lambda found: found.status is not BatchStatus.VALIDATING)
    stuck = await dead.thread.call(lambda: dead.lines.take([], 2, house.now_s))
    work = FakeWork()
    async with house.running(living, work):
        if stuck:       # else it was done before
            house.now_s += LEASE_S + 1
            house.beat("living")
        done = await until(living, batch, has(BatchStatus.COMPLETED))
    assert done.num_completed == 3 and lines_of(living, batch.output_file_id) == list("abc")


@pytest.mark.parametrize("error", [OverloadedError("full", retry_after_s=5.0), NotReadyError("starting"),
                                   ShardFailedError("gone")])
async def test_what_can_be_tried_again_is_later(house: House, error: ServingError) -> None:
    stores, work = house.stores("one"), FakeWork(errors=[error])
    batch = new_batch(stores, "a")
    async with house.running(stores, work):
        async with asyncio.timeout(120):
            await work.started.wait()
        async with asyncio.timeout(120):
            while work.asked["a"] < 2:
                house.now_s += 1
                await stores.thread.call(lambda: None)
        done = await until(stores, batch, has(BatchStatus.COMPLETED))
    assert done.num_completed == 1 and work.asked == {"a": 2}


@pytest.mark.parametrize(("error", "num_tries"), [(InvalidRequestError("wrong"), 1), (RuntimeError("our own"), 1),
                                                  (ShardFailedError("gone"), MAX_TRIES)])
async def test_a_line_that_fails_for_good_is_an_error(house: House, error: Exception, num_tries: int) -> None:
    stores, work = house.stores("one"), FakeWork(errors=[error] * num_tries)
    batch = new_batch(stores, "a")
    async with house.running(stores, work), asyncio.timeout(120):
        while work.asked["a"] < num_tries:
            house.now_s += 10
            await stores.thread.call(lambda: None)
        done = await until(stores, batch, has(BatchStatus.COMPLETED))
    assert (done.num_completed, done.num_failed, work.asked["a"]) == (0, 1, num_tries)
    assert lines_of(stores, batch.error_file_id)[0].startswith("a: ")


async def test_a_cancelled_batch_stops_what_is_computed(house: House) -> None:
    stores, work = house.stores("one"), FakeWork(stalls=True)
    batch = new_batch(stores, *"abc")
    async with house.running(stores, work), asyncio.timeout(120):
        await work.started.wait()
        await stores.thread.call(lambda: stores.batches.cancel("team", batch.batch_id, house.now_s))
        done = await until(stores, batch, has(BatchStatus.CANCELLED))
    assert (done.num_completed, done.num_failed) == (0, 3) and len(lines_of(stores, batch.error_file_id)) == 3


async def test_a_window_that_ends_stops_what_is_computed(house: House) -> None:
    stores, work = house.stores("one"), FakeWork(stalls=True)
    batch = new_batch(stores, *"abc")
    async with house.running(stores, work), asyncio.timeout(120):
        await work.started.wait()
        house.now_s += WINDOW_S
        done = await until(stores, batch, has(BatchStatus.EXPIRED))
    assert (done.num_completed, done.num_failed) == (0, 3) and len(lines_of(stores, batch.error_file_id)) == 3


async def test_while_others_wait_nothing_begins(house: House) -> None:
    stores, work = house.stores("one"), FakeWork()
    house.has_room = False
    batch = new_batch(stores, "a")
    async with house.running(stores, work):
        await until(stores, batch, has(BatchStatus.IN_PROGRESS))
        assert not work.asked
        house.has_room = True
        await until(stores, batch, has(BatchStatus.COMPLETED))


async def test_a_database_that_is_silent_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    stores, work, silent = house.stores("one"), FakeWork(), OperationalError("UPDATE", {}, Exception("no route"))
    finish, due = stores.lines.finish, stores.batches.due
    silences = {"finish": 2, "due": 2}

    def finish_later(line: Line, answer: LineAnswer) -> bool:
        silences["finish"] -= 1
        if silences["finish"] >= 0:
            raise silent
        return finish(line, answer)

    def due_later(now_s: float) -> list[str]:
        silences["due"] -= 1
        if silences["due"] >= 0:
            raise silent
        return due(now_s)
    monkeypatch.setattr(stores.lines, "finish", finish_later)
    monkeypatch.setattr(stores.batches, "due", due_later)
    batch = new_batch(stores, "a", "b")
    async with house.running(stores, work):
        done = await until(stores, batch, has(BatchStatus.COMPLETED))
    assert done.num_completed == 2 and work.asked == {"a": 1, "b": 1}
