"""Make a GenerationRequest of what a client asked at either door: both have these defaults and checks.

Defaults: temperature, top_p, top_k, min_p and repetition_penalty come from the checkpoint's generation_config.json,
else they are the OpenAI API's; max_tokens is the rest of the context for chats, and 16 for bare prompts (as there).
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar
from uuid import uuid4

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.body_bounds import MAX_COUNTED_TOKENS
from serving.ingress.prompts import Conversation, Prompt, PromptEncoder
from serving.router.generation import GenerationRequest, ModelCard, Service
from serving.router.request_checks import LengthLimit, context_limit, served_card
from serving.sampling_params import SamplingParams
from serving.tenants.key import Tenant
from serving.text.chat_template import ChatMessage
from serving.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS_OF_BARE_PROMPT = 16
B = TypeVar("B", bound=BaseModel)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

# Of a list the first wrong entry is the error: findings about each would cost a hundred times their bytes.
FIRST_ERROR = Field(fail_fast=True)
Strings = Annotated[list[str], FIRST_ERROR]
Integers = Annotated[list[int], FIRST_ERROR]


def _whole(value: object) -> object:
    """Read 16.0 as 16: to JSON they are one number, and some clients write all numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class SamplingFields(BaseModel):
    """Fields of sampling by the names of both doors; None is not said. SamplingParams has the limits."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    n: Whole | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    temperature: float | None = None
    top_k: Whole | None = None                  # 0 and -1: off, as vLLM's clients write it
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token ids as decimal strings: keys of JSON are strings
    seed: Whole | None = None
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Whole | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a client, the prompt aside."""

    model: str | None       # None: the first one served
    fields: SamplingFields
    request_id: str
    tenant: Tenant
    num_logprobs: int | None = None
    deadline_s: float | None = None
    grammar: str = ""       # that the answer must follow; empty: none
    priority: int | None = None     # None: the key's, or the default
    traceparent: str = ""   # see Caller


class RequestBuilder:
    def __init__(self, service: Service, tokenizer: Tokenizer) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)

    def card(self, model: str | None) -> ModelCard:
        """Return the served model of that name; without a name the first one. Raises ModelNotFoundError."""
        return served_card(self._service.cards, model)

    async def count(self, prompt: Prompt, card: ModelCard) -> tuple[int, ...]:
        """Return the token ids of a prompt that is not to be answered, so that it may be longer than the context."""
        num_tokens = max(MAX_COUNTED_TOKENS, card.max_model_len)
        limit = LengthLimit(num_tokens, f"at most {num_tokens} tokens of one text are counted")
        return (await self._encoder.encode([prompt], limit))[0]

    async def build(self, asked: Asked, prompts: Sequence[Prompt]) -> list[GenerationRequest]:
        """Tokenize the prompts of one body and fill in defaults; the service checks what comes out.

        Raises InvalidRequestError and its kinds, ModelNotFoundError.
        """
        card = self.card(asked.model)
        params = self._params(asked)        # cheap, so wrong values are told before a long prompt is tokenized
        encoded = await self._encoder.encode(prompts, context_limit(card))
        # A client may send one id twice at a time; ours must not clash.
        request_id = f"{asked.request_id}-{uuid4().hex[:8]}"
        return [GenerationRequest(
            request_id=request_id, model=card.name, prompt_token_ids=token_ids,
            params=params if isinstance(prompt, Conversation) else _with_max_tokens(params, len(token_ids), card),
            tenant=asked.tenant, deadline_s=asked.deadline_s, priority=asked.priority,
            prompt_field="messages" if isinstance(prompt, Conversation) else "prompt", traceparent=asked.traceparent)
            for prompt, token_ids in zip(prompts, encoded, strict=True)]

    def _params(self, asked: Asked) -> SamplingParams:
        given = asked.fields.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        if isinstance(asked.fields.stop, str):
            given["stop"] = [asked.fields.stop]
        if asked.fields.top_k in (0, -1):
            given["top_k"] = None
        defaults = dataclasses.asdict(self._tokenizer.sampling_defaults)
        given = {name: value for name, value in defaults.items() if value is not None} | given
        return check(SamplingParams, given | {"logprobs": asked.num_logprobs, "grammar": asked.grammar})


def chat_message(role: str, content: str, name: str | None = None, param: str = "messages",
                 reasoning: str | None = None) -> ChatMessage:
    """Check the role and return the message. `developer` is OpenAI's newer word for `system`, which is the one that
    templates know."""
    if role == "function":
        raise UnsupportedFieldError("messages of role 'function' are not supported", param=f"{param}.role",
                                    fix="send a message of role tool, with tool_call_id")
    if role not in _ROLES:
        raise InvalidRequestError(f"{role!r} is not a role", fix=f"use one of: {', '.join(_ROLES)}",
                                  param=f"{param}.role")
    return ChatMessage(_ROLES[role], content, name, reasoning)


def check(kind: type[B], values: object) -> B:
    """Return them as that type. Raises InvalidRequestError, which names the first wrong field and its value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error) from None


def invalid_request(error: ValidationError) -> InvalidRequestError:
    """Make one error of pydantic's findings, which names the first wrong field and its value."""
    findings = error.errors(include_url=False)
    param = field_name(findings[0]["loc"])
    # The alternatives of a union are findings of their own, about one field.
    reasons = dict.fromkeys(finding["msg"].removeprefix("Value error, ") for finding in findings
                            if field_name(finding["loc"]) == param)
    kind = findings[0]["type"]
    if kind == "extra_forbidden":
        return InvalidRequestError(f"unknown field {param!r}", fix="remove it, or check its spelling", param=param)
    is_null = findings[0]["input"] is None and _names_field(findings[0]["loc"])
    if kind == "missing" or is_null:
        return InvalidRequestError(f"{param} is missing", fix="give it", param=param)
    shown = "" if kind == "value_error" else f", got {_SHORT.repr(findings[0]['input'])}"
    return InvalidRequestError(f"{param or 'the body'}: {' or '.join(reasons)}{shown}", fix="correct it", param=param)


def _names_field(path: Sequence[int | str]) -> bool:
    """Return whether the path ends at a field of the body itself, or at one of the types that it may have."""
    return len(path) == 1 or (len(path) == 2 and str(path[1]).startswith(("str", "list[")))


def field_name(path: Sequence[int | str]) -> str | None:
    """Write pydantic's path as `messages[0].content`. Names of types, which stand for alternatives, are left out."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool", "list", "dict"):
            name += f".{part}" if name else part
    return name or None


def _with_max_tokens(params: SamplingParams, num_prompt: int, card: ModelCard) -> SamplingParams:
    if params.max_tokens is not None:
        return params
    default = min(DEFAULT_MAX_TOKENS_OF_BARE_PROMPT, card.max_model_len - num_prompt)
    return params.model_copy(update={"max_tokens": max(default, params.min_tokens, 1)})
