"""Pieces that wait together go together, in order, and an error comes last."""

from __future__ import annotations

import asyncio

import pytest

from model.step import TokenLogprob
from serving.engine.request import FinishReason
from serving.errors import NotReadyError
from serving.router.client_outbox import MAX_MERGED, ClientOutbox
from serving.router.generation import GenerationDelta


def piece(number: int, choice: int = 0, **fields: object) -> GenerationDelta:
    return GenerationDelta(choice, f"{number} ", (number,), (TokenLogprob(number, -1.0),), **fields)  # type: ignore[arg-type]


async def test_a_reader_that_keeps_up_gets_piece_by_piece() -> None:
    outbox = ClientOutbox()
    for number in range(3):
        reading = asyncio.create_task(outbox.take())
        await asyncio.sleep(0)
        outbox.put(0, piece(number))
        assert await reading == [(0, piece(number))]


async def test_what_waits_is_merged_by_part_and_choice() -> None:
    outbox = ClientOutbox()
    outbox.put(0, piece(1, prompt_logprobs=(TokenLogprob(9, -2.0),), num_cached_tokens=4))
    outbox.put(1, piece(5))
    outbox.put(0, piece(2, choice=1))
    outbox.put(0, piece(3, finish_reason=FinishReason.STOP, stop_reason="x"))
    scores = (TokenLogprob(1, -1.0), TokenLogprob(3, -1.0))
    merged = GenerationDelta(0, "1 3 ", (1, 3), scores, (TokenLogprob(9, -2.0),), 4, FinishReason.STOP, "x")
    assert await outbox.take() == [(0, merged), (1, piece(5)), (0, piece(2, choice=1))]


async def test_a_reader_that_comes_late_gets_pieces_of_a_bounded_size() -> None:
    outbox = ClientOutbox()
    for number in range(2 * MAX_MERGED + 1):
        outbox.put(0, piece(number))
    pieces = [delta for _, delta in await outbox.take()]
    assert [len(delta.token_ids) for delta in pieces] == [MAX_MERGED, MAX_MERGED, 1]
    assert [token_id for delta in pieces for token_id in delta.token_ids] == list(range(2 * MAX_MERGED + 1))


async def test_an_error_comes_after_what_was_there_before() -> None:
    outbox = ClientOutbox()
    outbox.put(0, piece(1))
    outbox.fail(NotReadyError("first"))
    outbox.fail(NotReadyError("second"))
    assert await outbox.take() == [(0, piece(1))]
    with pytest.raises(NotReadyError, match="first"):
        await outbox.take()


async def test_a_reader_that_gave_up_loses_nothing() -> None:
    outbox = ClientOutbox()
    reading = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    reading.cancel()
    outbox.put(0, piece(1))
    await asyncio.wait([reading])
    assert await outbox.take() == [(0, piece(1))]
