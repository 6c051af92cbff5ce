"""The requests of a run that is disturbed, and the answers of an undisturbed run that they are compared with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.proto import inference_pb2 as pb

FIRST_TOKEN_ID = 300            # below are special tokens and bytes


@dataclass(frozen=True)
class Question:
    """One request, asked again and again. `sampling` has what pb.Sampling takes."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return not self.sampling["temperature"]

    def request(self, model: str, request_id: str) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            model=model, token_ids=pb.TokenIds(ids=self.prompt), request_id=request_id,
            sampling=pb.Sampling(max_tokens=self.max_tokens, ignore_eos=True, **self.sampling))


@dataclass
class Answer:
    """What came of a question, as far as it has come."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, message: pb.GenerateResponse) -> None:
        self.token_ids += message.token_ids
        self.texts.append(message.text)
        self.logprobs += [scored.logprob for scored in message.logprobs]
        self.finish_reason = message.finish_reason

    @property
    def digest(self) -> str:
        content = (self.token_ids, "".join(self.texts), self.logprobs, self.finish_reason)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def new_questions(num_greedy: int, num_sampled: int, longest_prompt: int, max_tokens: tuple[int, int], vocab_size: int,
                  seed: int) -> list[Question]:
    """Return questions of mixed lengths. Every third greedy one is penalized for what it has said, and every fourth of
    all wants log-probabilities: then a continuation needs more than the last token to be right."""
    draw = random.Random(seed)
    questions = []
    for number in range(num_greedy + num_sampled):
        length = round(16 * (longest_prompt / 16) ** draw.random())
        sampling: dict[str, Any] = {"temperature": 0.0}
        if number >= num_greedy:
            sampling = {"temperature": 0.8, "top_p": 0.95, "seed": draw.getrandbits(31)}
        elif number % 3 == 0:
            sampling |= {"repetition_penalty": 1.2, "frequency_penalty": 0.1}
        if number % 4 == 1:
            sampling["logprobs"] = 1
        questions.append(Question(number, tuple(draw.choices(range(FIRST_TOKEN_ID, vocab_size), k=length)),
                                  draw.randint(*max_tokens), sampling))
    return questions


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Return the first position at which `found`, which may be shorter, is another."""
    return next((at for at, (ours, theirs) in enumerate(zip(found, expected, strict=False)) if ours != theirs),
                None if len(found) <= len(expected) else len(expected))
