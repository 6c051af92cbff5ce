"""A batch goes from one status to the next, whichever router takes the step, and once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sqlalchemy import Engine

from serving.batches import batch_store
from serving.batches.batch import WINDOW_S, BatchFault, BatchStatus, LineEntry
from serving.batches.line_store import LineAnswer
from serving.batches.page import Page
from serving.batches.stored_file import Purpose, new_file
from serving.errors import InvalidRequestError, NotFoundError
from serving.tenants.ledger import LEASE_S
from tests.serving.batches.batch_tools import NOW_S, content_of, end, new_batch, running_batch, stores_of

OUTPUTS = (new_file("team", "a", Purpose.BATCH_OUTPUT, NOW_S, 1.0),
           new_file("team", "b", Purpose.BATCH_OUTPUT, NOW_S, 1.0))


def test_a_new_batch_is_its_tenants_and_listed(engine: Engine) -> None:
    stores = stores_of(engine)
    batches = [new_batch(stores, "x", now_s=NOW_S + number) for number in range(3)]
    assert stores.batches.get("team", batches[0].batch_id) == batches[0]
    assert stores.batches.list_page("team", Page(2)) == ([batches[2], batches[1]], True)
    assert stores.batches.list_page("team", Page(2, batches[1].batch_id)) == ([batches[0]], False)
    for ask in (lambda: stores.batches.get("other", batches[0].batch_id), lambda: stores.batches.get("team", "none"),
                lambda: stores.batches.cancel("other", batches[0].batch_id, NOW_S)):
        with pytest.raises(NotFoundError):
            ask()
    assert stores.batches.list_page("other", Page(2)) == ([], False)


def test_what_cannot_be_an_input_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_of(engine)
    batch = running_batch(stores, "x")
    with pytest.raises(InvalidRequestError, match="open batch"):
        stores.files.delete("team", batch.input_file_id)
    with pytest.raises(NotFoundError):
        stores.batches.create(replace(batch, batch_id="batch_new", input_file_id="file-none"), OUTPUTS)
    monkeypatch.setattr(batch_store, "MAX_OPEN_BATCHES", 1)
    with pytest.raises(InvalidRequestError, match="1 batches are open"):
        new_batch(stores, "x")
    monkeypatch.setattr(batch_store, "MAX_OPEN_BATCHES", 2)
    monkeypatch.setattr(stores.batches, "_max_tenant_bytes", 1)
    with pytest.raises(InvalidRequestError, match="files have .* bytes, as many as they may"):
        stores.batches.create(replace(batch, batch_id="batch_new"), OUTPUTS)
    (line,) = stores.lines.take([], 1, NOW_S)
    stores.lines.finish(line, LineAnswer(b"{}\n", is_error=False))
    done = end(stores, batch)
    with pytest.raises(InvalidRequestError, match="output of a batch"):
        stores.batches.create(replace(done, batch_id="batch_new", input_file_id=done.output_file_id), OUTPUTS)
    stores.files.delete("team", batch.input_file_id)


def test_a_validation_is_one_routers_until_it_is_gone_and_then_begins_anew(engine: Engine) -> None:
    one, two = stores_of(engine, "one"), stores_of(engine, "two")
    batch = new_batch(one, "a", "b")
    assert one.batches.take_for_validation("one", NOW_S) == batch
    assert two.batches.take_for_validation("two", NOW_S) is None
    assert one.batches.add_lines(batch.batch_id, "one", [LineEntry(1, "a", 0, 1)])
    later_s = NOW_S + LEASE_S + 1
    stores_of(engine, "two", later_s)
    assert two.batches.take_for_validation("two", later_s) == batch
    assert not one.batches.add_lines(batch.batch_id, "one", [LineEntry(2, "b", 2, 1)])
    assert not one.batches.validated(batch.batch_id, "one", None, [], later_s)
    assert two.batches.add_lines(batch.batch_id, "two", [LineEntry(1, "a", 0, 1), LineEntry(2, "b", 2, 1)])
    assert two.batches.validated(batch.batch_id, "two", "tiny", [], later_s)
    found = two.batches.get("team", batch.batch_id)
    assert (found.status, found.num_total, found.model) == (BatchStatus.IN_PROGRESS, 2, "tiny")


def test_faults_end_a_batch(engine: Engine) -> None:
    stores = stores_of(engine)
    batch, fault = new_batch(stores, "x"), BatchFault("invalid_line", "wrong", 1, "url")
    stores.batches.take_for_validation("one", NOW_S)
    assert stores.batches.validated(batch.batch_id, "one", None, [fault], NOW_S + 1)
    found = stores.batches.get("team", batch.batch_id)
    assert (found.status, found.errors, found.times_s) == (BatchStatus.FAILED, (fault,), {"failed": NOW_S + 1})
    assert stores.lines.take([], 9, NOW_S) == [] and stores.batches.due(NOW_S) == []


def test_a_batch_without_open_lines_is_completed_with_its_files(engine: Engine) -> None:
    stores = stores_of(engine)
    batch = running_batch(stores, "a", "b")
    assert stores.batches.due(NOW_S) == [] and end(stores, batch).status is BatchStatus.IN_PROGRESS
    first, second = stores.lines.take([], 2, NOW_S)
    assert stores.lines.finish(first, LineAnswer(b"1\n", is_error=False))
    with pytest.raises(NotFoundError):
        stores.files.get("team", batch.output_file_id)
    assert stores.lines.finish(second, LineAnswer(b"2\n", is_error=False))
    assert stores.batches.due(NOW_S) == [batch.batch_id]
    done = end(stores, batch, NOW_S + 2)
    assert done.status is BatchStatus.COMPLETED and done.num_completed == 2 and stores.batches.due(NOW_S) == []
    assert list(done.times_s) == ["in_progress", "finalizing", "completed"]
    assert stores.files.get("team", batch.output_file_id).num_bytes == 4
    assert content_of(stores, batch.output_file_id) == b"1\n2\n"
    with pytest.raises(NotFoundError):
        stores.files.get("team", batch.error_file_id)
    with pytest.raises(InvalidRequestError, match="completed and cannot"):
        stores.batches.cancel("team", batch.batch_id, NOW_S)


def test_when_the_window_is_over_what_is_left_has_expired(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_store, "_NUM_AT_ONCE", 2)
    stores = stores_of(engine)
    batch = running_batch(stores, *"abcd")
    first, second = stores.lines.take([], 2, NOW_S)
    assert stores.lines.finish(first, LineAnswer(b"1\n", is_error=False))
    late_s = NOW_S + WINDOW_S
    assert stores.lines.take([], 9, late_s) == [] and stores.lines.not_wanted({batch.batch_id}, late_s)
    done = end(stores, batch, late_s)
    assert (done.status, done.num_completed, done.num_failed) == (BatchStatus.EXPIRED, 1, 3)
    assert not stores.lines.finish(second, LineAnswer(b"2\n", is_error=False))
    errors = [json.loads(line) for line in content_of(stores, batch.error_file_id).splitlines()]
    assert [error["custom_id"] for error in errors] == ["id-2", "id-3", "id-4"]
    assert content_of(stores, batch.output_file_id) == b"1\n"


def test_a_cancelled_batch_waits_for_the_lines_of_routers_that_live(engine: Engine) -> None:
    stores = stores_of(engine)
    batch = running_batch(stores, *"abc")
    first, second = stores.lines.take([], 2, NOW_S)
    assert stores.batches.cancel("team", batch.batch_id, NOW_S).status is BatchStatus.CANCELLING
    assert stores.batches.cancel("team", batch.batch_id, NOW_S).status is BatchStatus.CANCELLING
    assert stores.lines.take([], 9, NOW_S) == [] and stores.lines.not_wanted({batch.batch_id}, NOW_S)
    assert end(stores, batch).status is BatchStatus.CANCELLING
    assert stores.lines.finish(first, LineAnswer(b"1\n", is_error=False))       # it was just done
    stores.lines.free([second.place])
    done = end(stores, batch)
    assert (done.status, done.num_completed, done.num_failed, done.num_total) == (BatchStatus.CANCELLED, 1, 2, 3)
    assert stores.files.get("team", batch.output_file_id).num_bytes == 2


def test_lines_of_a_cancelled_batch_that_had_not_begun_say_so_some_at_a_time(
        engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_store, "_NUM_AT_ONCE", 2)
    stores = stores_of(engine)
    batch = running_batch(stores, *"abcdef")
    (held,) = stores.lines.take([], 1, NOW_S)
    stores.batches.cancel("team", batch.batch_id, NOW_S)
    for num_left in (2, 4, 5):
        assert stores.batches.advance(batch.batch_id, NOW_S)
        assert stores.batches.get("team", batch.batch_id).num_failed == num_left
    assert not stores.batches.advance(batch.batch_id, NOW_S)        # it waits for the one that is computed
    assert stores.lines.finish(held, LineAnswer(b"1\n", is_error=False))
    done = end(stores, batch)
    assert (done.status, done.num_completed, done.num_failed) == (BatchStatus.CANCELLED, 1, 5)
    errors = [json.loads(line) for line in content_of(stores, batch.error_file_id).splitlines()]
    assert [(error["custom_id"], error["error"]["code"]) for error in errors] == [
        (f"id-{number}", "batch_cancelled") for number in range(2, 7)]
    assert stores.files.get("team", batch.error_file_id).num_bytes > 0


def test_a_batch_that_is_cancelled_before_its_lines_are_known_has_no_files(engine: Engine) -> None:
    stores = stores_of(engine)
    batch = new_batch(stores, "a", "b")
    stores.batches.take_for_validation("one", NOW_S)
    assert stores.batches.add_lines(batch.batch_id, "one", [LineEntry(1, "a", 0, 1)])
    stores.batches.cancel("team", batch.batch_id, NOW_S)
    done = end(stores, batch)
    assert (done.status, done.num_failed) == (BatchStatus.CANCELLED, 0)
    with pytest.raises(NotFoundError):
        stores.files.get("team", batch.error_file_id)


def test_who_holds_lines_of_a_cancelled_batch_and_is_gone_is_not_waited_for(engine: Engine) -> None:
    stores = stores_of(engine)
    batch = running_batch(stores, "a")
    stores.lines.take([], 1, NOW_S)
    stores.batches.cancel("team", batch.batch_id, NOW_S)
    assert end(stores, batch, NOW_S + LEASE_S + 1).status is BatchStatus.CANCELLED


def test_old_batches_and_lines_that_are_over_go(engine: Engine) -> None:
    stores = stores_of(engine)
    over, open_one = running_batch(stores, "a", "b"), running_batch(stores, "c")
    stores.batches.cancel("team", over.batch_id, NOW_S)
    end(stores, over)
    assert stores.batches.sweep(NOW_S, 100.0) == 2 and stores.batches.sweep(NOW_S, 100.0) == 0
    assert len(stores.lines.take([], 9, NOW_S)) == 1
    stores.batches.sweep(NOW_S + 100.0, 100.0)
    assert stores.batches.list_page("team", Page(9)) == ([stores.batches.get("team", open_one.batch_id)], False)
