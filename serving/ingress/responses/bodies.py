"""The body of OpenAI's Responses API that clients send. Types only: SamplingParams checks the limits.

A field is implemented here, or stands in a table below with the values that change nothing, or is refused by name.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, JsonValue

from serving.ingress.build_request import FIRST_ERROR, Strings, Whole, check
from serving.ingress.json_reader import BodyBounds, read_json
from serving.ingress.unused_fields import Unused, refuse_unused

_STRICT = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
_FORBID = ConfigDict(frozen=True, extra="forbid", strict=True)
_IGNORED, _REFUSED, _OFF = Unused(never_matters=True), Unused(), Unused((False,))
REQUEST_FIELDS = {
    "background": _OFF, "context_management": Unused(([],)), "max_tool_calls": _REFUSED, "moderation": _REFUSED,
    "conversation": Unused(fix="use previous_response_id"), "prompt": _REFUSED, "prompt_cache_key": _IGNORED,
    "prompt_cache_options": _IGNORED, "prompt_cache_retention": _IGNORED, "safety_identifier": _IGNORED,
    "service_tier": Unused(("auto", "default")), "stream_options": Unused(({}, {"include_obfuscation": False})),
    "top_logprobs": Unused((0,)), "truncation": Unused(("disabled",), fix="shorten the input"),
}
ITEM_FIELDS = {"async": _OFF, "caller": _IGNORED, "namespace": _IGNORED, "phase": _IGNORED, "internal": _IGNORED}
PART_FIELDS = {"annotations": _IGNORED, "logprobs": _IGNORED, "prompt_cache_breakpoint": _IGNORED}
TOOL_FIELDS = {"allowed_callers": Unused((["direct"],)), "async": _OFF, "defer_loading": _OFF,
               "output_schema": _IGNORED}


class ContentPart(BaseModel):
    model_config = _STRICT
    type: str
    text: str | None = None
    refusal: str | None = None


ContentParts = Annotated[list[ContentPart], FIRST_ERROR]


class Item(BaseModel):
    """A message, a call of a function, its output, or reasoning; `type` may be left out of a message."""

    model_config = _STRICT
    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | ContentParts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | ContentParts | None = None
    summary: ContentParts | None = None
    encrypted_content: str | None = None        # which only others can read


class ToolBody(BaseModel):
    model_config = _STRICT
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class NamedTool(BaseModel):
    model_config = _STRICT
    type: str
    name: str | None = None


class Reasoning(BaseModel):
    model_config = _FORBID
    effort: str | None = None
    summary: str | None = None                  # of no effect: the reasoning itself is shown
    generate_summary: str | None = None


class TextConfig(BaseModel):
    model_config = _FORBID
    format: dict[str, JsonValue] | None = None
    verbosity: str | None = None


class ResponseBody(BaseModel):
    model_config = _STRICT
    model: str
    input: str | Annotated[list[Item], FIRST_ERROR]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[ToolBody], FIRST_ERROR] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: Strings | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    priority: Whole | None = None               # vLLM's


def parse_body(content: bytes, bounds: BodyBounds) -> ResponseBody:
    """Parse and check a request's body. Raises InvalidRequestError, UnsupportedFieldError."""
    body = check(ResponseBody, read_json(content, bounds))
    refuse_unused(body.model_extra or {}, REQUEST_FIELDS)
    return body
