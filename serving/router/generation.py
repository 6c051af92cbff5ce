"""Values that the doors (HTTP, gRPC) hand to the service and get back. Both doors have one shape."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from model.step import TokenLogprob
from serving.engine.request import FinishReason
from serving.sampling_params import SamplingParams
from serving.tenants.key import Tenant
from serving.tracing.request_trace import UNTRACED, RequestTrace


@dataclass(slots=True)
class ReasoningCount:
    """Tokens of reasoning, of all choices: who reads the answer counts them, for only the text tells."""

    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, `params.n` choices."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    tenant: Tenant = Tenant("default")          # admission is fair between tenants
    deadline_s: float | None = None             # seconds from now; None: the config's default
    priority: int | None = None                 # the lower the earlier; None: the key's, or the default
    prompt_field: str = "prompt"                # as errors name what the prompt was made of
    reasoning: ReasoningCount = field(default_factory=ReasoningCount, compare=False)
    traceparent: str = ""                       # W3C header that the client sent
    trace: RequestTrace = field(default=UNTRACED, compare=False)    # of the whole client's request


class GenerationDelta(NamedTuple):
    """The next piece of one choice. Pieces of different choices interleave; each choice ends with one finish_reason.

    `text` never ends in half a character, and never holds any part of a stop string. logprobs match token_ids one to
    one when asked for. `token_ids` may come without `text` (bytes held back), and text without them (flushed).
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()      # of prompt_token_ids[1:], in the choice's first delta
    num_cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None                # the stop string or stop token id that ended it


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One served model, for /v1/models."""

    name: str
    max_model_len: int
    created_s: int


class Service(Protocol):
    """The service as both doors call it. `InferenceService` (serving/router/service.py) is the real one."""

    @property
    def cards(self) -> tuple[ModelCard, ...]: ...

    def is_ready(self) -> bool:
        """Return whether an epoch is running and its shards are connected."""

    def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """Stream the choices of all parts of one client's request, each delta with its part's index.

        Closing the iterator cancels them. Raises ServingError, at the first delta or later.
        """
