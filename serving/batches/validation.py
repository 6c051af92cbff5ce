"""Looks through a batch's input file before any of it is computed: page by page, so that others have their turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from serving.batches.batch import MAX_ERRORS, Batch, BatchFault, LineEntry
from serving.batches.line_splitter import LineSplitter, RawLine
from serving.batches.stores import BatchStores
from serving.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 8 * 2**20      # as the body of one request
_PAGE_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class LineHead:
    """What a line says beside its request's body."""

    custom_id: str
    model: str | None


CheckLine = Callable[[bytes, str], LineHead]    # content and the batch's endpoint; raises InvalidRequestError


class InputCheck:
    """Checks the lines of one file, which comes in pieces."""

    def __init__(self, endpoint: str, max_lines: int, check: CheckLine) -> None:
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._check = check
        self._splitter = LineSplitter(MAX_LINE_BYTES)
        self._line_of: dict[str, int] = {}          # by custom_id
        self.model: str | None = None               # of the first line
        self.faults: list[BatchFault] = []
        self.is_over = False                        # nothing more needs to be looked at

    def feed(self, content: bytes, is_last: bool = False) -> list[LineEntry]:
        """Return the lines of a piece of the file that are right; note what is wrong."""
        entries: list[LineEntry] = []
        try:
            for line in self._splitter.feed(content, is_last):
                entries += self._entries(line)
                if self.is_over:
                    return entries
        except InvalidRequestError as error:        # a line is too long
            self._stop(BatchFault("line_too_long", str(error)))
        if is_last and not self._line_of and not self.faults:
            self._stop(BatchFault("empty_file", "the file has no line. Upload one with a request in each line"))
        return entries

    def _entries(self, line: RawLine) -> list[LineEntry]:
        try:
            head = self._check(line.content, self._endpoint)
        except InvalidRequestError as error:
            self._note(BatchFault("invalid_line", str(error), line.number, error.param))
            return []
        before = self._line_of.setdefault(head.custom_id, line.number)
        if before != line.number:
            self._note(BatchFault("duplicate_custom_id", f"line {before} has this custom_id already. Give each its own",
                                  line.number, "custom_id"))
            return []
        if len(self._line_of) > self._max_lines:
            self._stop(BatchFault("too_many_lines", f"the file has more than {self._max_lines} lines. Split it"))
            return []
        self.model = self.model or head.model
        return [LineEntry(line.number, head.custom_id, line.first_byte, len(line.content))]

    def _note(self, fault: BatchFault) -> None:
        self.faults.append(fault)
        self.is_over = len(self.faults) >= MAX_ERRORS

    def _stop(self, fault: BatchFault) -> None:
        self._note(fault)
        self.is_over = True


async def validate(stores: BatchStores, batch: Batch, check_line: CheckLine, clock: Callable[[], float]) -> None:
    """Look through the file of a batch that this router has taken for that. Raises NotReadyError."""
    check = InputCheck(batch.endpoint, stores.config.max_lines, check_line)
    first = 0
    while not check.is_over:
        chunks = await stores.thread.call(partial(stores.files.chunks, batch.input_file_id, first, _PAGE_CHUNKS))
        content = b"".join(chunk for _, chunk in chunks)
        entries = await asyncio.to_thread(check.feed, content, not chunks)
        if not check.faults and not await stores.thread.call(
                partial(stores.batches.add_lines, batch.batch_id, stores.router_id, entries)):
            return          # it was cancelled, or another router has it
        if not chunks:
            break
        first = chunks[-1][0] + 1
    is_ours = await stores.thread.call(lambda: stores.batches.validated(
        batch.batch_id, stores.router_id, check.model, check.faults, clock()))
    if is_ours:
        logger.info("batch_validated batch_id=%s num_faults=%d", batch.batch_id, len(check.faults))
