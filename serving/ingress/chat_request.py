"""One chat as every door asks it, and the request for the engine that is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pydantic import JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.build_request import Asked, RequestBuilder
from serving.ingress.chat_answer import ChatAsked
from serving.ingress.prompts import Conversation
from serving.ingress.structured_output import checked_lark, grammar_of
from serving.ingress.tool_grammar import call_grammar
from serving.ingress.tools import ToolUse
from serving.option_types import ToolParserName
from serving.router.generation import GenerationRequest, ModelCard, Service
from serving.text.answers import reasoning
from serving.text.answers.answer_format import AnswerFormat, AnswerRules
from serving.text.tokenizer import Tokenizer

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_PROMPT_END = 16        # tokens, in which a template may open the reasoning


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """`formats`: what the whole answer must look like, by the names of OpenAI's and vLLM's fields. `conversation`
    comes without tools."""

    asked: Asked
    conversation: Conversation
    tools: ToolUse = ToolUse()
    formats: Mapping[str, JsonValue] = field(default_factory=dict)
    shows_reasoning: bool = True


def effort_variables(effort: str | None, param: str) -> dict[str, JsonValue]:
    """Return what the chat template is told of how hard to think. Raises InvalidRequestError."""
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise InvalidRequestError(f"{param} is {effort[:80]!r}", fix=f"use one of: {', '.join(_EFFORTS)}", param=param)
    told: dict[str, JsonValue] = {"enable_thinking": False} if effort == "none" else {}
    return told | {"reasoning_effort": effort}


@contextmanager
def renamed_params(names: Mapping[str, str]) -> Iterator[None]:
    """Name the fields of errors raised within as an API does that has other names for them."""
    try:
        yield
    except InvalidRequestError as error:
        error.param = names.get(error.param or "", error.param)
        raise


class ChatBuilder:
    def __init__(self, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None = None) -> None:
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(service, tokenizer)
        self._format = tokenizer.answer_format(tool_parser)

    def card(self, model: str | None) -> ModelCard:
        """Return the served model of that name. Raises ModelNotFoundError."""
        return self._builder.card(model)

    async def build(self, question: ChatQuestion) -> ChatAsked:
        """Check the chat. Raises InvalidRequestError and its kinds, ModelNotFoundError."""
        tools, fields = question.tools, question.asked.fields
        self._check_tools(question)
        grammar = await grammar_of(question.formats, fields)
        is_formed = grammar is not None     # the whole answer is of that form
        if grammar is not None and tools.tools:
            raise UnsupportedFieldError(
                f"{next(iter(question.formats))} beside tools that may be called is not supported",
                param=next(iter(question.formats)), fix="set tool_choice to none, or remove it")
        call = call_grammar(tools, self._format.tool_parser)
        if call is not None:
            grammar = await checked_lark("tools", call, fields)
        start = self._format.call_start(tools.name) if tools.must_call else ""
        conversation = self._conversation(question, start, ends_thinking=bool(start or is_formed))
        (request,) = await self._builder.build(replace(question.asked, grammar=grammar or ""), [conversation])
        if is_formed:
            return ChatAsked(request, AnswerRules(AnswerFormat()))
        return self._asked(request, AnswerRules(
            self._format, bool(tools.tools), tools.max_calls, start, schemas=tools.schemas()),
            question.shows_reasoning)

    async def count(self, question: ChatQuestion) -> int:
        """Return how many tokens the prompt of the chat has. Raises InvalidRequestError and its kinds."""
        self._check_tools(question)
        conversation = self._conversation(question, "", ends_thinking=False)
        return len(await self._builder.count(conversation, self.card(question.asked.model)))

    def _check_tools(self, question: ChatQuestion) -> None:
        if question.tools.tools and self._format.tool_parser is None:
            raise UnsupportedFieldError("the chat template does not show how this model writes tool calls",
                                        param="tools", fix="remove them, or set router.tool_parser in the config")
        if question.tools.must_call and not question.conversation.add_generation_prompt:
            raise InvalidRequestError("a call is required, and add_generation_prompt is false", param="tool_choice",
                                      fix="leave add_generation_prompt out")
        if question.tools.must_call and question.conversation.answer_start:
            raise InvalidRequestError("a call is required, and the answer is begun", param="tool_choice",
                                      fix="end with a message of the user")

    def _conversation(self, question: ChatQuestion, call_start: str, ends_thinking: bool) -> Conversation:
        is_begun = bool(question.conversation.answer_start)
        return replace(question.conversation, tools=question.tools.for_template(), call_start=call_start,
                       ends_thinking=ends_thinking or is_begun)

    def _asked(self, request: GenerationRequest, rules: AnswerRules, shows_reasoning: bool) -> ChatAsked:
        tokenizer = self._tokenizer
        prompt_end = tokenizer.decode(request.prompt_token_ids[-_PROMPT_END:], skip_special_tokens=False)
        rules = replace(rules, opens_thinking=rules.format.thinks and reasoning.opens_thinking(prompt_end))
        tags = rules.format.markers(rules.reads_calls)
        if any(tokenizer.token_id(tag) in tokenizer.special_token_ids for tag in tags):
            # What tells the parts of an answer apart must be in its text.
            request = replace(request, params=request.params.model_copy(update={"skip_special_tokens": False}))
        return ChatAsked(request, rules, shows_reasoning, tokenizer.token_id(reasoning.END))
