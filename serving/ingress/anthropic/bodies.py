"""The bodies of Anthropic's Messages API that clients send. Types only: SamplingParams checks the limits.

A field is implemented here, or stands in a table below with the values that change nothing, or is refused by name.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from serving.ingress.build_request import FIRST_ERROR, Whole, check
from serving.ingress.json_reader import BodyBounds, read_json
from serving.ingress.unused_fields import Unused, refuse_unused

_STRICT = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
_IGNORED, _REFUSED = Unused(never_matters=True), Unused()
_KEEPS_ALL: JsonValue = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
REQUEST_FIELDS = {
    "cache_control": _IGNORED, "container": _REFUSED, "context_management": Unused(({}, {"edits": []}, _KEEPS_ALL)),
    "diagnostics": _IGNORED, "inference_geo": _IGNORED, "mcp_servers": Unused(([],)),
    "service_tier": Unused(("auto", "standard_only")), "speed": Unused(("standard",)), "user_profile_id": _IGNORED,
    "workspace_id": _IGNORED,
}
BLOCK_FIELDS = {
    "cache_control": _IGNORED, "caller": _IGNORED, "citations": Unused(([], {"enabled": False})), "source": _REFUSED,
    "toolset_name": _IGNORED,
}
TOOL_FIELDS = {
    "allowed_callers": Unused((["direct"],)), "cache_control": _IGNORED, "defer_loading": Unused((False,)),
    "eager_input_streaming": _IGNORED, "input_examples": Unused(([],), fix="write them into the description"),
}


class ResultPart(BaseModel):
    model_config = _STRICT
    type: str
    text: str | None = None


class Block(BaseModel):
    """A part of a message: text, thinking, a call of a tool, or its result."""

    model_config = _STRICT
    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None        # ours is empty: whatever the client gives back is taken
    data: str | None = None             # of redacted thinking, which only others can read
    id: str | None = None
    name: str | None = None
    input: dict[str, JsonValue] | None = None
    tool_use_id: str | None = None
    content: str | Annotated[list[ResultPart], FIRST_ERROR] | None = None
    is_error: bool | None = None


class TurnBody(BaseModel):
    model_config = _STRICT
    role: str
    content: str | Annotated[list[Block], FIRST_ERROR]


class ToolBody(BaseModel):
    model_config = _STRICT
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolChoice(BaseModel):
    model_config = _STRICT
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    type: str
    budget_tokens: Whole | None = None      # of no effect: the model ends its thinking itself
    display: str | None = None


class OutputConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    effort: str | None = None
    format: dict[str, JsonValue] | None = None


class Metadata(BaseModel):
    model_config = _STRICT
    user_id: str | None = None


class CountTokensBody(BaseModel):
    """What the tokens of a message are counted of."""

    model_config = _STRICT
    model: str
    messages: Annotated[list[TurnBody], FIRST_ERROR]
    system: str | Annotated[list[Block], FIRST_ERROR] | None = None
    tools: Annotated[list[ToolBody], FIRST_ERROR] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountTokensBody):
    max_tokens: Whole
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], FIRST_ERROR] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    metadata: Metadata | None = None
    priority: Whole | None = None       # vLLM's, as in the other APIs


B = TypeVar("B", MessagesBody, CountTokensBody)


def parse_body(kind: type[B], content: bytes, bounds: BodyBounds) -> B:
    """Parse and check a request's body. Raises InvalidRequestError, UnsupportedFieldError."""
    body = check(kind, read_json(content, bounds))
    refuse_unused(body.model_extra or {}, REQUEST_FIELDS)
    return body
