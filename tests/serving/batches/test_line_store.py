"""A line is computed by whoever has it, and answered once."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from serving.batches.batch import TokenCounts
from serving.batches.line_store import LineAnswer
from serving.batches.stored_file import CHUNK_BYTES
from serving.errors import InvalidRequestError
from serving.tenants.ledger import LEASE_S
from tests.serving.batches.batch_tools import NOW_S, content_of, end, running_batch, stores_of

RIGHT = LineAnswer(b"right\n", is_error=False, tokens=TokenCounts(5, 1, 3, 2))
WRONG = LineAnswer(b"wrong\n", is_error=True)


def test_two_routers_never_have_one_line(engine: Engine) -> None:
    one, two = stores_of(engine, "one"), stores_of(engine, "two")
    running_batch(one, *"abcde")
    taken = one.lines.take([], 2, NOW_S)
    others = two.lines.take([], 9, NOW_S)
    assert [line.entry.number for line in taken + others] == [1, 2, 3, 4, 5]
    assert one.lines.take([line.place for line in taken], 9, NOW_S) == []
    assert one.lines.take([taken[0].place], 9, NOW_S) == [taken[1]]     # of which it does not know
    two.lines.free([line.place for line in [*taken, *others]])          # only its own
    assert [line.entry.number for line in one.lines.take([line.place for line in taken], 9, NOW_S)] == [3, 4, 5]


def test_lines_of_a_router_that_is_gone_are_taken_and_answered_once(engine: Engine) -> None:
    one, two = stores_of(engine, "one"), stores_of(engine, "two")
    batch = running_batch(one, "a")
    (line,) = one.lines.take([], 1, NOW_S)
    assert two.lines.take([], 1, NOW_S) == []
    later_s = NOW_S + LEASE_S + 1
    stores_of(engine, "two", later_s)
    (again,) = two.lines.take([], 1, later_s)
    assert again == line and two.lines.finish(again, RIGHT)
    assert not one.lines.finish(line, RIGHT)        # it was not gone, only late
    done = end(two, batch)
    assert (done.num_completed, done.tokens) == (1, RIGHT.tokens)
    assert content_of(two, batch.output_file_id) == b"right\n"


def test_batches_take_turns(engine: Engine) -> None:
    stores = stores_of(engine)
    first, second = running_batch(stores, *"abcd"), running_batch(stores, *"efgh", tenant="other")
    taken = stores.lines.take([], 3, NOW_S)
    assert {line.batch.batch_id for line in taken} == {first.batch_id, second.batch_id}
    places, order = [line.place for line in taken], []
    for now_s in (NOW_S + 1, NOW_S + 2):
        (line,) = stores.lines.take(places, 1, now_s)
        places.append(line.place)
        order.append(line.batch.batch_id)
    assert len(set(order)) == 2


def test_a_line_is_read_where_it_stands_also_over_the_ends_of_chunks(engine: Engine) -> None:
    stores = stores_of(engine)
    lines = ["x" * (CHUNK_BYTES - 3), "abcdefg", "y" * (2 * CHUNK_BYTES), "é"]
    running_batch(stores, *lines)
    assert [stores.lines.read(line).decode() for line in stores.lines.take([], 9, NOW_S)] == lines


def test_what_is_given_back_waits_with_its_batch(engine: Engine) -> None:
    stores = stores_of(engine)
    running_batch(stores, *"ab")
    (line,) = stores.lines.take([], 1, NOW_S)
    stores.lines.give_back(line, is_try=True, retry_s=NOW_S + 10)
    assert stores.lines.take([], 9, NOW_S + 9) == []
    assert [found.num_tries for found in stores.lines.take([], 9, NOW_S + 10)] == [1, 0]


def test_errors_are_counted_and_stand_in_a_file_of_their_own(engine: Engine) -> None:
    stores = stores_of(engine)
    batch = running_batch(stores, *"ab")
    first, second = stores.lines.take([], 2, NOW_S)
    assert stores.lines.finish(first, WRONG) and stores.lines.finish(second, RIGHT)
    done = end(stores, batch)
    assert (done.num_completed, done.num_failed) == (1, 1)
    assert content_of(stores, batch.error_file_id) == b"wrong\n"


def test_answers_count_as_bytes_of_the_tenant(engine: Engine) -> None:
    stores = stores_of(engine, max_tenant_bytes=8)
    batch = running_batch(stores, "abc")
    (line,) = stores.lines.take([], 1, NOW_S)
    with pytest.raises(InvalidRequestError, match="more than 8 bytes"):
        stores.lines.finish(line, RIGHT)
    assert stores.lines.finish(line, WRONG)
    assert end(stores, batch).num_failed == 1 and content_of(stores, batch.output_file_id) == b""
