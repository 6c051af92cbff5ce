"""Serve /v1/batches: a body becomes a batch, which the routers' runners compute, and a batch its description."""

from __future__ import annotations

import time
from collections.abc import Mapping

from serving.batches.batch import OPEN, WINDOW_S, Batch, BatchStatus, new_batch_id
from serving.batches.page import Page
from serving.batches.stored_file import Purpose, new_file
from serving.batches.stores import BatchStores
from serving.ingress.batches.batch_types import (
    BatchAnswer,
    BatchBody,
    BatchList,
    BatchQuery,
    BatchUsage,
    FaultAnswer,
    Faults,
    InputTokens,
    OutputTokens,
    RequestCounts,
)
from serving.ingress.batches.files import keep_s_of
from serving.ingress.build_request import check
from serving.ingress.caller import Caller
from serving.ingress.json_reader import BodyBounds, read_json


class BatchesEndpoint:
    def __init__(self, stores: BatchStores) -> None:
        self._stores = stores

    async def create(self, body: BatchBody, caller: Caller) -> BatchAnswer:
        """Begin a batch. Raises InvalidRequestError, NotFoundError."""
        now_s, batch_id = time.time(), new_batch_id()
        keep_s = WINDOW_S + keep_s_of(body.output_expires_after, self._stores, "output_expires_after")
        outputs = (new_file(caller.owner, f"{batch_id}_output.jsonl", Purpose.BATCH_OUTPUT, now_s, keep_s),
                   new_file(caller.owner, f"{batch_id}_error.jsonl", Purpose.BATCH_OUTPUT, now_s, keep_s))
        batch = Batch(batch_id, caller.owner, caller.key.key_id if caller.key else None, body.endpoint,
                      body.input_file_id, outputs[0].file_id, outputs[1].file_id, now_s, now_s + WINDOW_S,
                      body.metadata or {})
        await self._stores.thread.call(lambda: self._stores.batches.create(batch, outputs))
        return to_answer(batch)

    async def get(self, batch_id: str, owner: str) -> BatchAnswer:
        """Describe a batch. Raises NotFoundError."""
        return to_answer(await self._stores.thread.call(lambda: self._stores.batches.get(owner, batch_id)))

    async def list(self, query: Mapping[str, str], owner: str) -> BatchList:
        """Return a page of the owner's batches, the newest first. Raises InvalidRequestError, NotFoundError."""
        wanted = check(BatchQuery, query)
        page = Page(wanted.limit, wanted.after)
        batches, has_more = await self._stores.thread.call(lambda: self._stores.batches.list_page(owner, page))
        return BatchList(data=[to_answer(batch) for batch in batches], has_more=has_more,
                         first_id=batches[0].batch_id if batches else None,
                         last_id=batches[-1].batch_id if batches else None)

    async def cancel(self, batch_id: str, owner: str) -> BatchAnswer:
        """Take no more lines of a batch. Raises NotFoundError, InvalidRequestError."""
        return to_answer(await self._stores.thread.call(
            lambda: self._stores.batches.cancel(owner, batch_id, time.time())))


def parse_batch_body(content: bytes, bounds: BodyBounds) -> BatchBody:
    """Parse and check a body. Raises InvalidRequestError."""
    return check(BatchBody, read_json(content, bounds))


def to_answer(batch: Batch) -> BatchAnswer:
    def at(status: BatchStatus) -> int | None:
        return int(batch.times_s[status]) if status in batch.times_s else None
    tokens, is_over = batch.tokens, batch.status not in OPEN
    return BatchAnswer(
        id=batch.batch_id, endpoint=batch.endpoint, model=batch.model, input_file_id=batch.input_file_id,
        errors=Faults(data=[FaultAnswer.of(fault) for fault in batch.errors]) if batch.errors else None,
        status=batch.status, created_at=int(batch.created_s), expires_at=int(batch.expires_s),
        in_progress_at=at(BatchStatus.IN_PROGRESS), finalizing_at=at(BatchStatus.FINALIZING),
        completed_at=at(BatchStatus.COMPLETED), failed_at=at(BatchStatus.FAILED), expired_at=at(BatchStatus.EXPIRED),
        cancelling_at=at(BatchStatus.CANCELLING), cancelled_at=at(BatchStatus.CANCELLED),
        output_file_id=batch.output_file_id if is_over and batch.num_completed else None,
        error_file_id=batch.error_file_id if is_over and batch.num_failed else None,
        request_counts=RequestCounts(total=batch.num_total, completed=batch.num_completed, failed=batch.num_failed),
        usage=BatchUsage(input_tokens=tokens.num_prompt, output_tokens=tokens.num_generated,
                         input_tokens_details=InputTokens(cached_tokens=tokens.num_cached),
                         output_tokens_details=OutputTokens(reasoning_tokens=tokens.num_reasoning),
                         total_tokens=tokens.num_prompt + tokens.num_generated),
        metadata=dict(batch.labels) or None)
