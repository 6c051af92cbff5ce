"""One choice of a chat as clients get it: reasoning, content and tool calls, told apart while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from serving.engine.request import FinishReason
from serving.ingress.collect import CollectedChoice, UsageCount, open_stream
from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.text.answers.answer_format import AnswerRules
from serving.text.answers.answer_parser import AnswerParser
from serving.text.answers.parts import Content, Part, Reasoning

NewId = Callable[[], str]


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """A chat that is to be answered, and how its answers are read."""

    request: GenerationRequest
    rules: AnswerRules
    shows_reasoning: bool = True
    think_end_id: int | None = None     # the token that ends reasoning, where it is one

    @property
    def new_id(self) -> NewId:
        return mistral_call_id if self.rules.format.tool_parser == "mistral" else call_id


class ChatAnswer:
    """Reads one choice."""

    def __init__(self, asked: ChatAsked) -> None:
        self._parser = None if asked.rules.is_plain else AnswerParser(asked.rules)
        self._shows_reasoning = asked.shows_reasoning
        self._think_end_id = asked.think_end_id
        self._num_undecided = 0
        self._count_of_request = asked.request.reasoning
        self.new_id = asked.new_id
        self.kept: list[Part] = []
        self.num_reasoning_tokens = 0

    def read(self, delta: GenerationDelta) -> list[Part]:
        """Return what the delta says for certain."""
        if self._parser is None:
            return [Content(delta.text)] if delta.text else []
        was_thinking = self._parser.is_thinking
        parts = self._parser.start() + self._parser.push(delta.text)
        if was_thinking is not False:
            self._count(delta.token_ids, self._parser.is_thinking, bool(was_thinking) or any(
                isinstance(part, Reasoning) for part in parts))
        if delta.finish_reason is not None:
            parts += self._parser.end()
        return parts if self._shows_reasoning else [part for part in parts if not isinstance(part, Reasoning)]

    def keep(self, delta: GenerationDelta) -> None:
        """Read the delta into `kept`."""
        self.kept += self.read(delta)

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        if reason is FinishReason.STOP and self._parser is not None and self._parser.has_calls:
            return "tool_calls"
        return None if reason is None else reason.value

    def _count(self, token_ids: Sequence[int], is_thinking: bool | None, has_thought: bool) -> None:
        """Count tokens of the reasoning, its end included."""
        end = self._think_end_id
        self._num_undecided += token_ids.index(end) + 1 if end is not None and end in token_ids else len(token_ids)
        if is_thinking is None:
            return
        if is_thinking or has_thought:
            self.num_reasoning_tokens += self._num_undecided
            self._count_of_request.num_tokens += self._num_undecided
        self._num_undecided = 0


async def collect_chat(service: Service, asked: ChatAsked
                       ) -> tuple[list[CollectedChoice], list[ChatAnswer], UsageCount]:
    """Return all that the choices say, and the same told apart. Raises ServingError."""
    usage = UsageCount([asked.request])
    collected = [CollectedChoice() for _ in range(asked.request.params.n)]
    answers = [ChatAnswer(asked) for _ in collected]
    async with open_stream(service, [asked.request]) as deltas:
        async for index, delta in deltas:
            usage.add(index, delta)
            collected[delta.choice].add(delta)
            answers[delta.choice].keep(delta)
    if asked.rules.format.thinks:
        usage.num_reasoning_tokens = sum(answer.num_reasoning_tokens for answer in answers)
    return collected, answers, usage


def call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def mistral_call_id() -> str:
    """Return nine letters and digits: Mistral's templates take no others."""
    return uuid4().hex[:9]
