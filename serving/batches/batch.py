"""A batch of requests, its lines, and what comes of them. Pure."""

from __future__ import annotations

import enum
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.errors import (
    DeadlineExceededError,
    NotReadyError,
    OverloadedError,
    ServingError,
    ShardFailedError,
)

WINDOW_S = 24 * 3600.0          # completion_window: the only one that there is
MAX_TRIES = 5                   # of a line that fails by no fault of its own
MAX_RETRY_S = 60.0
MAX_ERRORS = 20                 # of an input file, that are told
_WHY_UNANSWERED = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed, because its batch was cancelled."}


class BatchStatus(enum.StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


NEXT: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset({BatchStatus.FAILED, BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING}),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED, BatchStatus.EXPIRED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
}
OPEN = frozenset(NEXT)          # the others are ends


class LineOutcome(enum.StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"         # this and the next: it was never answered
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenCounts:
    num_prompt: int = 0
    num_cached: int = 0         # of the prompt
    num_generated: int = 0
    num_reasoning: int = 0      # of the generated


@dataclass(frozen=True, slots=True)
class BatchFault:
    """What is wrong with an input file, and in which line, counted from 1; None: in the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    batch_id: str
    tenant: str
    key_id: str | None
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    created_s: float            # Unix time, as all here
    expires_s: float
    labels: Mapping[str, str]
    status: BatchStatus = BatchStatus.VALIDATING
    times_s: Mapping[str, float] = field(default_factory=dict)
    errors: tuple[BatchFault, ...] = ()
    model: str | None = None
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    tokens: TokenCounts = TokenCounts()


@dataclass(frozen=True, slots=True)
class LineEntry:
    """A line of an input file that was found right."""

    number: int
    custom_id: str
    first_byte: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a router has taken."""

    batch: Batch
    entry: LineEntry
    num_tries: int

    @property
    def place(self) -> tuple[str, int]:
        return self.batch.batch_id, self.entry.number


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(12)}"


def line_id(batch_id: str, number: int) -> str:
    """Return the id of a line's request, which is the same at each try."""
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


def unanswered_line(batch_id: str, number: int, custom_id: str, outcome: LineOutcome) -> bytes:
    """Return what the error file says of a line that was not answered before its batch expired or was cancelled."""
    code = f"batch_{outcome}"
    error = {"code": code, "message": _WHY_UNANSWERED[code]}
    return json.dumps({"id": line_id(batch_id, number), "custom_id": custom_id, "response": None,
                       "error": error}).encode() + b"\n"


def retry_after_s(error: ServingError, num_tries: int) -> float | None:
    """Return how long the batch of a line waits before it is tried again; None: the error is its answer.

    Who is not let in, or finds no shards, has used nothing: that counts as no try.
    """
    match error:
        case OverloadedError():
            return error.retry_after_s
        case NotReadyError():
            return 1.0
        case ShardFailedError() | DeadlineExceededError():
            return min(MAX_RETRY_S, 2.0 ** num_tries) if num_tries + 1 < MAX_TRIES else None
        case _:
            return None


def counts_as_try(error: ServingError) -> bool:
    return not isinstance(error, (OverloadedError, NotReadyError))
