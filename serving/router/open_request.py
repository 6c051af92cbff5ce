"""A client's request after admission: its choices, their sequences, and what waits to be sent to the client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from serving.engine.request import Submission
from serving.errors import ServingError
from serving.router.admission import Ticket
from serving.router.choice import Choice
from serving.router.generation import GenerationDelta, GenerationRequest
from serving.text.detokenizer import Detokenizer
from serving.text.tokenizer import Tokenizer

# The router ends late requests itself; a shard's deadline is for routers that vanish without breaking their stream.
SHARD_DEADLINE_GRACE_S = 5.0


@dataclass(eq=False, slots=True)
class OpenRequest:
    request: GenerationRequest
    ticket: Ticket
    arrival_s: float
    deadline_s: float
    hashes: tuple[int, ...]                                         # of the prompt's blocks, for the choice of shards
    choices: list[Choice] = field(default_factory=list)
    # Unbounded, but a sequence has at most max_tokens: a client that does not read must not hold back the others.
    outbox: asyncio.Queue[GenerationDelta | ServingError] = field(default_factory=asyncio.Queue)
    deadline_timer: asyncio.TimerHandle | None = None
    last_token_s: dict[int, float] = field(default_factory=dict)    # by choice

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


def new_choice(request: GenerationRequest, index: int, sequence_id: str, tokenizer: Tokenizer) -> Choice:
    params = request.params
    text = Detokenizer(tokenizer, request.prompt_token_ids, params.stop, params.include_stop_str_in_output,
                       params.skip_special_tokens, params.min_tokens)
    return Choice(index, sequence_id, text, params.stop_token_ids, params.include_stop_str_in_output)


def new_submission(open_request: OpenRequest, sequence_id: str, seed: int, max_model_len: int,
                   eos_token_ids: tuple[int, ...]) -> Submission:
    """The sequence of one choice. Without max_tokens it may use what the prompt leaves of the context."""
    params = open_request.request.params
    end_ids = () if params.ignore_eos else eos_token_ids
    return Submission(
        request_id=sequence_id, prompt_token_ids=open_request.request.prompt_token_ids,
        sampling=params.to_spec(wrapped_seed(seed)),
        max_tokens=params.max_tokens or max_model_len - open_request.num_prompt_tokens, min_tokens=params.min_tokens,
        stop_token_ids=tuple(dict.fromkeys((*end_ids, *params.stop_token_ids))),
        num_prompt_logprobs=params.prompt_logprobs, deadline_s=open_request.deadline_s + SHARD_DEADLINE_GRACE_S)


def wrapped_seed(seed: int) -> int:
    """Into the signed 64 bits of a seed."""
    return (seed + 2**63) % 2**64 - 2**63
