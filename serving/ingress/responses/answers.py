"""The answers of OpenAI's Responses API, field by field: a response, its items, and the events of a stream."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.ingress.responses.bodies import NamedTool, Reasoning, TextConfig, ToolBody

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class OutputText(_Answer):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class ReasoningText(_Answer):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class MessageItem(_Answer):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: tuple[OutputText, ...] = ()


class ReasoningItem(_Answer):
    type: Literal["reasoning"] = "reasoning"
    id: str
    status: Status = "in_progress"
    summary: tuple[()] = ()
    content: tuple[ReasoningText, ...] = ()


class FunctionCallItem(_Answer):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class CachedTokens(_Answer):
    cached_tokens: int
    cache_write_tokens: int = 0


class ReasoningTokens(_Answer):
    reasoning_tokens: int


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseError(_Answer):
    code: str
    message: str
    param: str | None = None


class Incomplete(_Answer):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(_Answer):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: tuple[OutputItem, ...] = ()
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Reasoning
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | NamedTool
    tools: list[ToolBody]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class Deleted(_Answer):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


def _is_none(value: object) -> bool:
    return value is None


class Event(_Answer):
    """One event of a stream. Which fields it has beside the first two its type says."""

    type: str
    sequence_number: int = 0
    response: Response | None = Field(default=None, exclude_if=_is_none)
    output_index: int | None = Field(default=None, exclude_if=_is_none)
    item: OutputItem | None = Field(default=None, exclude_if=_is_none)
    item_id: str | None = Field(default=None, exclude_if=_is_none)
    content_index: int | None = Field(default=None, exclude_if=_is_none)
    part: OutputText | ReasoningText | None = Field(default=None, exclude_if=_is_none)
    delta: str | None = Field(default=None, exclude_if=_is_none)
    text: str | None = Field(default=None, exclude_if=_is_none)
    name: str | None = Field(default=None, exclude_if=_is_none)
    arguments: str | None = Field(default=None, exclude_if=_is_none)
    logprobs: tuple[()] | None = Field(default=None, exclude_if=_is_none)
