"""The bodies of OpenAI's API that clients send, with vLLM's extras. Types only: SamplingParams checks the limits.

A field is implemented here, or stands in unused_fields.py, or is refused as unknown; none is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.build_request import (
    FIRST_ERROR,
    Integers,
    SamplingFields,
    Strings,
    Whole,
    chat_message,
    check,
)
from serving.ingress.chat_request import effort_variables
from serving.ingress.json_reader import BodyBounds, read_json
from serving.ingress.prompts import Conversation, Text, TokenIds
from serving.ingress.structured_output import FORMAT_FIELDS
from serving.ingress.tools import NamedTool, ToolBodies, ToolCallBody, check_arguments, to_tool_calls
from serving.ingress.unused_fields import CONTENT_PART_FIELDS, MESSAGE_FIELDS, REQUEST_FIELDS, Unused, refuse_unused
from serving.text.chat_template import ChatMessage

_STRICT = ConfigDict(frozen=True, extra="allow", strict=True)


class ContentPart(BaseModel):
    model_config = _STRICT
    type: str
    text: str | None = None
    refusal: str | None = None


class MessageBody(BaseModel):
    model_config = _STRICT
    role: str
    content: str | Annotated[list[ContentPart], FIRST_ERROR] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None                # vLLM's newer name of it
    tool_calls: Annotated[list[ToolCallBody], FIRST_ERROR] | None = None
    tool_call_id: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    include_usage: bool | None = None           # in a last chunk without choices
    continuous_usage_stats: bool | None = None  # so far, in every chunk
    include_obfuscation: bool | None = None


class FormFields(SamplingFields):
    """What the answer must look like; at most one of these says it."""

    response_format: dict[str, JsonValue] | None = None
    structured_outputs: dict[str, JsonValue] | None = None
    guided_json: dict[str, JsonValue] | str | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None

    def form(self) -> dict[str, JsonValue]:
        return self.model_dump(include=set(FORMAT_FIELDS), exclude_none=True)


class ChatCompletionBody(FormFields):
    model: str
    messages: Annotated[list[MessageBody], FIRST_ERROR]
    max_completion_tokens: Whole | None = None
    best_of: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    request_id: str | None = None
    priority: Whole | None = None
    tools: ToolBodies | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None


def _false_is_none(value: object) -> object:
    """Read false as null: clients of both paths write `logprobs: false` where a number belongs."""
    return None if value is False else value


class CompletionBody(FormFields):
    model: str
    prompt: str | Strings | Integers | Annotated[list[Integers], FIRST_ERROR]
    best_of: Whole | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole | None, BeforeValidator(_false_is_none)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    request_id: str | None = None
    priority: Whole | None = None


class TokenizeBody(BaseModel):
    model_config = _STRICT
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], FIRST_ERROR] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    return_token_strs: bool | None = None
    tools: ToolBodies | None = None


class DetokenizeBody(BaseModel):
    model_config = _STRICT
    model: str | None = None
    tokens: Integers


_Body = TypeVar("_Body", ChatCompletionBody, CompletionBody, TokenizeBody, DetokenizeBody)
_BODIES: tuple[type[BaseModel], ...] = (ChatCompletionBody, CompletionBody, TokenizeBody, DetokenizeBody)
# What is a field of one path only is known to the others too: null there says nothing.
_OTHER_FIELDS = {name: Unused(fix="remove it: it is no field of this path")
                 for body in _BODIES for name in body.model_fields} | REQUEST_FIELDS


def parse_body(kind: type[_Body], content: bytes, bounds: BodyBounds) -> _Body:
    """Parse and check a request's body. Raises InvalidRequestError, UnsupportedFieldError."""
    body = check(kind, read_json(content, bounds))
    extras = dict(body.model_extra or {})
    if extras.get("function_call") == "none":
        extras.pop("functions", None)       # what must not be called need not be known
    refuse_unused(extras, _OTHER_FIELDS)
    if isinstance(body, (ChatCompletionBody, CompletionBody)):
        _check_stream_options(body)
        _check_best_of(body)
    return body


def _check_best_of(body: ChatCompletionBody | CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise UnsupportedFieldError(f"best_of={body.best_of} unlike n is not supported", param="best_of",
                                    fix="remove it, and choose among the n choices yourself")


def _check_stream_options(body: ChatCompletionBody | CompletionBody) -> None:
    if body.stream_options is None:
        return
    if not body.stream and any(body.stream_options.model_dump().values()):
        raise InvalidRequestError("stream_options is given without stream", fix="set stream to true, or remove it",
                                  param="stream_options")
    if body.stream_options.include_obfuscation:
        raise UnsupportedFieldError("include_obfuscation is not supported", fix="remove it",
                                    param="stream_options.include_obfuscation")


def wants_usage(options: StreamOptions | None) -> bool:
    return options is not None and bool(options.include_usage)


def wants_continuous_usage(options: StreamOptions | None) -> bool:
    return options is not None and bool(options.continuous_usage_stats)


def to_conversation(messages: list[MessageBody], add_generation_prompt: bool | None,
                    variables: Mapping[str, JsonValue] | None) -> Conversation:
    check_arguments([call.function.arguments or "" for message in messages for call in message.tool_calls or ()],
                    "messages")
    return Conversation(tuple(_to_message(message, f"messages[{index}]") for index, message in enumerate(messages)),
                        add_generation_prompt is not False, variables or {})


def template_variables(body: ChatCompletionBody) -> Mapping[str, JsonValue]:
    """Return what the chat template is told: how hard to think, and what the client gives it by name."""
    return effort_variables(body.reasoning_effort, "reasoning_effort") | (body.chat_template_kwargs or {})


def _to_message(message: MessageBody, param: str) -> ChatMessage:
    refuse_unused(message.model_extra or {}, MESSAGE_FIELDS, param, " in a message")
    parts = message.content
    if parts is None and message.role != "assistant":       # an assistant may have said nothing
        raise InvalidRequestError(f"{param}.content is missing", fix="give a string or a list of text parts",
                                  param=f"{param}.content")
    if parts is None or isinstance(parts, str):
        content = parts or ""
    else:       # joined as vLLM does
        content = "\n".join(_to_text(part, f"{param}.content[{index}]") for index, part in enumerate(parts))
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    made = chat_message(message.role, content, message.name, param, reasoning)
    if message.tool_calls and made.role != "assistant":
        raise InvalidRequestError(f"a message of role {made.role!r} has tool_calls", param=f"{param}.tool_calls",
                                  fix="only an assistant's may")
    if made.role == "tool" and not message.tool_call_id:
        raise InvalidRequestError(f"{param}.tool_call_id is missing", fix="give the id of the call that it answers",
                                  param=f"{param}.tool_call_id")
    calls = to_tool_calls(message.tool_calls or (), param)
    return replace(made, tool_calls=calls, tool_call_id=message.tool_call_id or None)


def _to_text(part: ContentPart, param: str) -> str:
    if part.type not in ("text", "refusal"):
        raise UnsupportedFieldError(f"content parts of type {part.type!r} are not supported",
                                    fix="send parts of type text", param=f"{param}.type")
    refuse_unused(part.model_extra or {}, CONTENT_PART_FIELDS, param, " in a content part")
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise InvalidRequestError(f"{param}.{part.type} is missing", fix="give it", param=f"{param}.{part.type}")
    return text


def to_prompts(body: CompletionBody) -> list[Text | TokenIds]:
    """Return at least one prompt, of a string, token ids, or a list of either."""
    special = body.add_special_tokens is not False
    if isinstance(body.prompt, str):
        return [Text(body.prompt, special)]
    if not body.prompt:
        raise InvalidRequestError("prompt is an empty list", fix="give a string, token ids, or a list of either",
                                  param="prompt")
    token_ids = tuple(entry for entry in body.prompt if isinstance(entry, int))
    if token_ids:
        return [TokenIds(token_ids)]
    return [Text(entry, special) if isinstance(entry, str) else TokenIds(tuple(entry))
            for entry in body.prompt if not isinstance(entry, int)]
