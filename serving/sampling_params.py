"""Check what a client asks of the sampler. Both doors build this; the limits are here only."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.step import SamplingSpec

MAX_LOGPROBS = 20
MAX_CHOICES = 128               # of one prompt
MAX_COUNT = 2**31 - 1           # of tokens; top_k and token ids too: what the wire and int32 tensors hold
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256       # of one stop string
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_GRAMMAR_CHARACTERS = 2**16  # of a grammar, also one that was made of a schema
MIN_REPETITION_PENALTY = 0.01   # logits are divided by it, in float32

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class SamplingParams(BaseModel):
    """One request's sampling. temperature 0 is greedy; ranges are the OpenAI API's or, for its extensions, vLLM's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: PositiveCount | None = None     # None: as many as the context allows
    min_tokens: Count = 0
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_k: PositiveCount | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0        # 0: the likeliest token, as temperature 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=2.0)] = 1.0
    logit_bias: dict[Count, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(default_factory=dict,
                                                                                  max_length=MAX_LOGIT_BIASES)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None    # None: the service draws one
    stop: Annotated[tuple[StopString, ...], Field(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[tuple[Count, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None    # of generated tokens; 0: chosen only
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    grammar: Annotated[str, Field(max_length=MAX_GRAMMAR_CHARACTERS)] = ""      # of llguidance; empty: none

    @model_validator(mode="after")
    def _min_tokens_can_be_reached(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: lower min_tokens")
        return self

    def to_spec(self, seed: int) -> SamplingSpec:
        """Return the part that the sampler needs. `seed` is the one drawn for this choice when the client gave none."""
        return SamplingSpec(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, logit_bias=tuple(sorted(self.logit_bias.items())),
            seed=seed, num_logprobs=self.logprobs, grammar=self.grammar)
