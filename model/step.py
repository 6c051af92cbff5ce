"""Says what scheduler and runner tell each other: plain values only. Pure: no torch.

A step is one lockstep forward of the group. The scheduler of a shard writes a StepPlan, the runner answers with a
StepResult. Neither is changed after it was made, so a step that failed can be run again from the same plan. What there
is of for every sequence in every step is a named tuple, which is made in a third of the time of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """Says how to draw one token from logits. A draw depends only on (seed, position, logits).

    temperature 0 means greedy, as do `top_p=0.0` and `top_k=1`. `top_k=None` and `top_p=1.0`, `min_p=0.0` switch a
    filter off. Penalties of 0 (presence, frequency) and 1 (repetition) do nothing. `num_logprobs` None: no
    log-probabilities; 0: of the chosen token only; n: also of the n most likely tokens.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    seed: int = 0
    num_logprobs: int | None = None
    grammar: str = ""           # of llguidance, that the output must follow; empty: none

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def needs_history(self) -> bool:
        return self.has_penalties or bool(self.grammar)


class ScheduledRequest(NamedTuple):
    """Says what one sequence computes in one step.

    `token_ids` are the tokens at positions num_computed_tokens, num_computed_tokens + 1, ...; their keys and values go
    into the blocks of `block_table` (block i holds positions i * block_size ...). When `sampling` is set, one token is
    drawn from the logits of the last of them; its position is num_computed_tokens + len(token_ids). Where layers keep
    a state, it is read from one slot and written to another, so that the plan can be run again.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_computed_tokens: int
    block_table: tuple[int, ...]
    sampling: SamplingSpec | None = None
    prompt_token_ids: tuple[int, ...] = ()      # only when sampling.needs_history
    output_token_ids: tuple[int, ...] = ()      # only when sampling.needs_history
    num_prompt_logprobs: int | None = None      # n: of every prompt token scored in this chunk, and the top n
    prompt_targets: tuple[int, ...] = ()        # with it: target i is scored by the logits of token_ids[i]
    state_read: int | None = None               # slot of the state after num_computed_tokens tokens; None: none yet
    state_write: int | None = None              # slot of the state after token_ids; None: no layer keeps one
    state_snapshots: tuple[tuple[int, int], ...] = ()   # (so many of token_ids, slot of the state after those)


@dataclass(frozen=True, slots=True)
class StepPlan:
    epoch_number: int
    step_index: int
    requests: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        """Return the tokens of sequences that compute more than one: of prompts, or again after a preemption."""
        return sum(len(request.token_ids) for request in self.requests if len(request.token_ids) > 1)


@dataclass(frozen=True, slots=True)
class StepHeader:
    """Holds what a member tells every other before a step; sent as integers by one small all-gather."""

    epoch_number: int
    step_index: int
    num_tokens: int
    prepared_revision: int = 0      # of the placement: this member could switch to it now
    num_prompt_tokens: int = 0      # of num_tokens; all others are decoded

    def to_ints(self) -> tuple[int, int, int, int, int]:
        return (self.epoch_number, self.step_index, self.num_tokens, self.prepared_revision, self.num_prompt_tokens)

    @staticmethod
    def from_ints(ints: tuple[int, ...]) -> StepHeader:
        epoch_number, step_index, num_tokens, prepared_revision, num_prompt_tokens = ints
        return StepHeader(epoch_number, step_index, num_tokens, prepared_revision, num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Holds the natural-log probability of one token, and of the likeliest at the same position, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SampledToken(NamedTuple):
    request_id: str
    token_id: int | None                                # None: this chunk drew nothing (prefill goes on)
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()      # one for each of prompt_targets
    error: str = ""                                     # why nothing could be drawn that had to be


@dataclass(frozen=True, slots=True)
class StepWork:
    """Holds the seconds that a member worked in a step, waiting for others not included; an emulated speed is."""

    own_s: tuple[float, ...]        # for its own rows: up to the first layer's experts, ..., and after the last's
    planning_s: tuple[float, ...]   # by MoE layer: whose rows go to which expert, whatever their number
    experts_s: tuple[float, ...]    # by MoE layer, for whoever's rows: picked, computed, and ready to go back

    @property
    def total_s(self) -> float:
        return sum(self.own_s) + sum(self.planning_s) + sum(self.experts_s)


@dataclass(frozen=True, slots=True)
class StepStats:
    """Says what a step did on this member, for counts of experts and of work."""

    expert_rows: tuple[tuple[int, ...], ...] = ()       # [layer][local expert in placement order], for anybody
    work: StepWork | None = None                        # None: not timed

    @property
    def num_expert_rows(self) -> int:
        """Return the (row, expert) pairs computed here, all layers together."""
        return sum(map(sum, self.expert_rows))


@dataclass(frozen=True, slots=True)
class StepResult:
    epoch_number: int
    step_index: int
    tokens: tuple[SampledToken, ...]                    # same order as the plan's requests
    stats: StepStats = StepStats()
