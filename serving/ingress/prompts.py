"""Checks what a prompt may be, and makes token ids of it at a cost that is bounded before it is paid."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from serving.errors import InvalidRequestError
from serving.ingress.body_bounds import MAX_TOKEN_IDS
from serving.router.request_checks import LengthLimit, prompt_too_long
from serving.text.answers.reasoning import end_thinking
from serving.text.chat_template import ChatMessage
from serving.text.tokenizer import Tokenizer

_LONG_TEXT = 2048       # characters; from there a thread encodes it, below the switch costs more than it saves
_MANY = 8               # prompts or messages, likewise


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True
    variables: Mapping[str, JsonValue] = field(default_factory=dict)    # of the chat template
    tools: tuple[Mapping[str, JsonValue], ...] = ()
    answer_start: str = ""              # what the client has written of the answer
    call_start: str = ""                # what the answer is made to begin with
    ends_thinking: bool = False         # where the template has opened the reasoning


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenIds:
    token_ids: tuple[int, ...]


Prompt = Conversation | Text | TokenIds


class PromptEncoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def encode(self, prompts: Sequence[Prompt], limit: LengthLimit) -> list[tuple[int, ...]]:
        """Return the token ids of the prompts of one body. Raises InvalidRequestError and ContextLengthError.

        Texts that must have more tokens than the limit are refused before all of them are made.
        """
        if len(prompts) < _MANY and sum(map(_num_characters, prompts)) < _LONG_TEXT:
            return self._encode_all(prompts, limit)
        return await asyncio.to_thread(self._encode_all, prompts, limit)

    def _encode_all(self, prompts: Sequence[Prompt], limit: LengthLimit) -> list[tuple[int, ...]]:
        encoded, num_tokens = [], 0
        max_tokens = max(MAX_TOKEN_IDS, limit.num_tokens)
        for prompt in prompts:
            encoded.append(self._encode(prompt, limit))
            num_tokens += len(encoded[-1])
            if num_tokens > max_tokens:
                raise InvalidRequestError(f"the prompts have more than {max_tokens} tokens together", param="prompt",
                                          fix="send them in several requests")
        return encoded

    def _encode(self, prompt: Prompt, limit: LengthLimit) -> tuple[int, ...]:
        if isinstance(prompt, TokenIds):
            return self._tokenizer.shared_ids(prompt.token_ids)
        if isinstance(prompt, Text):
            return self._encode_text(prompt.text, prompt.add_special_tokens, limit, "prompt")
        text = self._tokenizer.apply_chat_template(prompt.messages, prompt.add_generation_prompt, prompt.variables,
                                                   prompt.tools)
        if prompt.ends_thinking:
            text = end_thinking(text) + self._tokenizer.quote(prompt.answer_start) + prompt.call_start
        return self._encode_text(text, False, limit, "messages")        # the template wrote the special tokens

    def _encode_text(self, text: str, add_special_tokens: bool, limit: LengthLimit, param: str) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        if tokenizer.has_more_tokens(text, limit.num_tokens):
            raise prompt_too_long(f"more than {limit.num_tokens}", limit, param)
        token_ids = tokenizer.encode(text, add_special_tokens)
        largest = max(token_ids, default=0)
        if largest >= tokenizer.num_embeddings:
            raise InvalidRequestError(f"the text has the token {tokenizer.token_name(largest)!r}, which this model has "
                                      "no embedding of", fix="leave it out", param=param)
        return tokenizer.shared_ids(token_ids)


def _num_characters(prompt: Prompt) -> int:
    """Return what tells whether encoding takes long; many short messages count as a long text."""
    if isinstance(prompt, TokenIds):
        return len(prompt.token_ids)
    if isinstance(prompt, Text):
        return len(prompt.text)
    is_many = len(prompt.messages) + len(prompt.tools) >= _MANY
    return _LONG_TEXT if is_many else sum(message.num_characters for message in prompt.messages)
