"""A client's request from its acceptance to its end: its parts, their choices and sequences."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serving.engine.request import Submission
from serving.metrics import MoveCause
from serving.priority import DEFAULT_PRIORITY
from serving.router.admission import Ticket
from serving.router.choice import Choice
from serving.router.client_outbox import ClientOutbox
from serving.router.generation import GenerationRequest
from serving.text.detokenizer import Detokenizer
from serving.text.tokenizer import Tokenizer

# The router ends late requests itself; a shard's deadline is for routers that vanish without breaking their stream.
SHARD_DEADLINE_GRACE_S = 5.0


@dataclass(eq=False, slots=True)
class OpenRequest:
    """One client's request: its parts, one for each prompt, and what waits to be sent to the client."""

    arrival_s: float
    deadline_s: float
    parts: list[OpenPart] = field(default_factory=list)             # those that were offered to admission
    outbox: ClientOutbox = field(default_factory=ClientOutbox)
    deadline_timer: asyncio.TimerHandle | None = None
    starter: asyncio.Task[None] | None = None                       # of the parts after the first
    is_over: bool = False                                           # ended or failed as a whole


@dataclass(eq=False, slots=True)
class OpenPart:
    """One prompt of an open request, with its choices once it was admitted."""

    whole: OpenRequest
    index: int
    request: GenerationRequest
    ticket: Ticket
    hashes: tuple[int, ...] = ()                                    # of the prompt's blocks, for the choice of shards
    choices: list[Choice] = field(default_factory=list)
    last_token_s: dict[int, float] = field(default_factory=dict)    # by choice
    moved: dict[int, MoveCause] = field(default_factory=dict)       # choices without a token since
    cost: float = 0.0                                               # of the tokens so far

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


def new_choices(part: OpenPart, sequence_ids: Sequence[str], tokenizer: Tokenizer) -> list[Choice]:
    """Make one choice for each sequence. What depends on the request alone is computed once."""
    params = part.request.params
    text = Detokenizer(tokenizer, part.request.prompt_token_ids, params.stop, params.include_stop_str_in_output,
                       params.skip_special_tokens, params.min_tokens)
    return [Choice(index, sequence_id, text.copy(), params.stop_token_ids, params.include_stop_str_in_output)
            for index, sequence_id in enumerate(sequence_ids)]


def new_submissions(part: OpenPart, seed: int, max_model_len: int, eos_token_ids: tuple[int, ...]
                    ) -> list[Submission]:
    """Make the sequences of all choices. Without max_tokens each may use what the prompt leaves of the context."""
    params = part.request.params
    end_ids = () if params.ignore_eos else eos_token_ids
    first = Submission(
        request_id="", prompt_token_ids=part.request.prompt_token_ids, sampling=params.to_spec(seed),
        max_tokens=params.max_tokens or max_model_len - part.num_prompt_tokens, min_tokens=params.min_tokens,
        stop_token_ids=tuple(dict.fromkeys((*end_ids, *params.stop_token_ids))),
        num_prompt_logprobs=params.prompt_logprobs, deadline_s=part.whole.deadline_s + SHARD_DEADLINE_GRACE_S,
        priority=priority_of(part.request), tenant=tenant_number(part.request.tenant.name),
        traceparent=part.request.trace.traceparent, weight=part.request.tenant.weight)
    return [replace(first, request_id=choice.sequence_id,
                    sampling=replace(first.sampling, seed=wrapped_seed(seed + choice.index)))
            for choice in part.choices]


def priority_of(request: GenerationRequest) -> int:
    return DEFAULT_PRIORITY if request.priority is None else request.priority


def tenant_number(name: str) -> int:
    """Return what shards know a tenant by: the same from all routers, and nothing of its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def wrapped_seed(seed: int) -> int:
    """Into the signed 64 bits of a seed."""
    return (seed + 2**63) % 2**64 - 2**63
