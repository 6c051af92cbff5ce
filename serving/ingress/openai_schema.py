"""The bodies of OpenAI's API that clients send, with vLLM's extras. Types only: SamplingParams checks the limits.

A field is implemented, or harmless to ignore, or refused by name; none is dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.build_request import Conversation, SamplingFields, Text, TokenIds, chat_message, invalid_request
from serving.text.chat_template import ChatMessage

_STRICT = ConfigDict(frozen=True, extra="allow", strict=True)


class ContentPart(BaseModel):
    model_config = _STRICT
    type: str
    text: str | None = None


class MessageBody(BaseModel):
    model_config = _STRICT
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatCompletionBody(SamplingFields):
    model: str
    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class CompletionBody(SamplingFields):
    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(BaseModel):
    model_config = _STRICT
    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = _STRICT
    model: str | None = None
    tokens: list[int]


_Body = TypeVar("_Body", ChatCompletionBody, CompletionBody, TokenizeBody, DetokenizeBody)


def _only(*values: JsonValue) -> Callable[[JsonValue], bool]:
    return lambda value: value is None or value in values


def _anything(value: JsonValue) -> bool:
    return True


# Fields of the OpenAI API that are not implemented -> the values with which ignoring them cannot change the answer.
_IGNORABLE: dict[str, Callable[[JsonValue], bool]] = {
    "metadata": _anything, "safety_identifier": _anything, "prompt_cache_key": _anything,
    "prompt_cache_retention": _anything, "prompt_cache_options": _anything,
    "store": _only(False), "service_tier": _only("auto", "default"), "parallel_tool_calls": _anything,
    "tools": _only([]), "tool_choice": _only("none", "auto"), "functions": _only([]),
    "function_call": _only("none", "auto"), "response_format": _only({"type": "text"}), "modalities": _only(["text"]),
    "verbosity": _only("medium"), "suffix": _only(""), "audio": _only(), "prediction": _only(), "moderation": _only(),
    "web_search_options": _only(), "reasoning_effort": _only()}
_UNSUPPORTED_IN_MESSAGES = frozenset({"tool_calls", "tool_call_id", "function_call", "audio", "refusal"})


def parse_body(kind: type[_Body], content: bytes) -> _Body:
    """Parse and check a request's body. Raises InvalidRequestError, UnsupportedFieldError."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise invalid_request(error) from None
    extras = dict(body.model_extra or {})
    if extras.get("tool_choice") == "none":
        extras.pop("tools", None)       # what must not be called need not be known
    _refuse_extras(extras)
    if isinstance(body, (ChatCompletionBody, CompletionBody)):
        _check_stream_options(body)
    return body


def _refuse_extras(extras: Mapping[str, JsonValue]) -> None:
    for name, value in extras.items():
        if name not in _IGNORABLE:
            raise InvalidRequestError(f"unknown field {name!r}", fix="remove it, or check its spelling", param=name)
        if not _IGNORABLE[name](value):
            raise UnsupportedFieldError(f"{name} is not supported", fix="remove it", param=name)


def _check_stream_options(body: ChatCompletionBody | CompletionBody) -> None:
    if body.stream_options is None:
        return
    if not body.stream:
        raise InvalidRequestError("stream_options is given without stream", fix="set stream to true, or remove it",
                                  param="stream_options")
    if body.stream_options.include_obfuscation:
        raise UnsupportedFieldError("include_obfuscation is not supported", fix="remove it",
                                    param="stream_options.include_obfuscation")


def wants_usage(options: StreamOptions | None) -> bool:
    return options is not None and bool(options.include_usage)


def to_conversation(messages: list[MessageBody], add_generation_prompt: bool | None,
                    variables: Mapping[str, JsonValue] | None) -> Conversation:
    return Conversation(tuple(_to_message(message, f"messages[{index}]") for index, message in enumerate(messages)),
                        add_generation_prompt is not False, variables or {})


def _to_message(message: MessageBody, param: str) -> ChatMessage:
    for name, value in (message.model_extra or {}).items():
        if name not in _UNSUPPORTED_IN_MESSAGES:
            raise InvalidRequestError(f"unknown field {name!r} in a message", fix="remove it", param=f"{param}.{name}")
        if value:
            raise UnsupportedFieldError(f"{name} in a message is not supported", fix="remove it",
                                        param=f"{param}.{name}")
    if message.content is None:
        raise InvalidRequestError(f"{param}.content is missing", fix="give a string or a list of text parts",
                                  param=f"{param}.content")
    if isinstance(message.content, str):
        content = message.content
    else:       # joined as vLLM does
        content = "\n".join(_to_text(part, f"{param}.content[{index}]") for index, part in enumerate(message.content))
    return chat_message(message.role, content, message.name, param)


def _to_text(part: ContentPart, param: str) -> str:
    if part.type != "text":
        raise UnsupportedFieldError(f"content parts of type {part.type!r} are not supported",
                                    fix="send parts of type text", param=f"{param}.type")
    for name in part.model_extra or {}:
        raise InvalidRequestError(f"unknown field {name!r} in a content part", fix="remove it", param=f"{param}.{name}")
    if part.text is None:
        raise InvalidRequestError(f"{param}.text is missing", fix="give it", param=f"{param}.text")
    return part.text


def to_prompts(body: CompletionBody) -> list[Text | TokenIds]:
    """A string, token ids, or a list of either -> at least one prompt."""
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
