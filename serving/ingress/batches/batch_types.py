"""Bodies, queries and answers of /v1/batches, and the lines of their files. Types only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from serving.batches.batch import BatchFault, BatchStatus
from serving.ingress.batches.file_types import ExpiresAfter, ObjectId

_FROZEN = ConfigDict(frozen=True)
_FORBID = ConfigDict(frozen=True, extra="forbid")
BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
Label = Annotated[str, Field(max_length=512)]
Labels = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]


class BatchBody(BaseModel):
    model_config = _FORBID
    input_file_id: ObjectId
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: Labels | None = None
    output_expires_after: ExpiresAfter | None = None        # from the batch's creation


class BatchQuery(BaseModel):
    """What may stand behind the `?` of a list of batches."""

    model_config = _FORBID
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: ObjectId | None = None


class BatchLineBody(BaseModel):
    """One line of an input file."""

    model_config = _FORBID
    custom_id: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]
    method: Literal["POST"]
    url: BatchEndpoint
    body: dict[str, JsonValue]


class RequestCounts(BaseModel):
    model_config = _FROZEN
    total: int
    completed: int
    failed: int


class FaultAnswer(BaseModel):
    model_config = _FROZEN
    code: str
    message: str
    line: int | None
    param: str | None

    @classmethod
    def of(cls, fault: BatchFault) -> FaultAnswer:
        return cls(code=fault.code, message=fault.message, line=fault.line, param=fault.param)


class Faults(BaseModel):
    model_config = _FROZEN
    object: Literal["list"] = "list"
    data: list[FaultAnswer]


class InputTokens(BaseModel):
    model_config = _FROZEN
    cached_tokens: int


class OutputTokens(BaseModel):
    model_config = _FROZEN
    reasoning_tokens: int


class BatchUsage(BaseModel):
    model_config = _FROZEN
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class BatchAnswer(BaseModel):
    model_config = _FROZEN
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: Faults | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    model_config = _FROZEN
    object: Literal["list"] = "list"
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class LineResponse(BaseModel):
    model_config = _FROZEN
    status_code: int
    request_id: str
    body: JsonValue


class OutputLine(BaseModel):
    """One line of an output or error file."""

    model_config = _FROZEN
    id: str
    custom_id: str
    response: LineResponse
    error: None = None
