"""The answers of Anthropic's Messages API, field by field: messages, the events of a stream, errors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class TextBlock(_Answer):
    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ThinkingBlock(_Answer):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""             # nothing is signed: any thinking that a client gives back is taken


class ToolUseBlock(_Answer):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, JsonValue]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class Usage(_Answer):
    """`input_tokens` are those that the prefix cache did not serve."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    service_tier: Literal["standard"] = "standard"


class Message(_Answer):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


class MessageStart(_Answer):
    type: Literal["message_start"] = "message_start"
    message: Message


class BlockStart(_Answer):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: ContentBlock


class TextDelta(_Answer):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(_Answer):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureDelta(_Answer):
    type: Literal["signature_delta"] = "signature_delta"
    signature: str = ""


class InputDelta(_Answer):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class BlockDelta(_Answer):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(_Answer):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDelta(_Answer):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(_Answer):
    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    usage: Usage


class MessageStop(_Answer):
    type: Literal["message_stop"] = "message_stop"


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class TokenCount(_Answer):
    input_tokens: int


class ErrorDetail(_Answer):
    type: str
    message: str
    param: str | None = Field(description="the field that is wrong, which Anthropic's own answers only name in words")
    code: str | None


class ErrorAnswer(_Answer):
    type: Literal["error"] = "error"
    error: ErrorDetail
    request_id: str
