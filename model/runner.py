"""Runs one step of one member: StepPlan -> tensors -> forward -> sampled tokens. Owns the caches.

T rows of the step, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.batch import BlockTables, StepBatch, build_batch
from model.caches import SequenceCaches
from model.dispatch.dispatcher import Dispatcher
from model.expert_host import MemberModel
from model.grammar import GrammarMasks
from model.kernels.protocol import ExpertWeights
from model.logprobs import logprobs_of
from model.pace import UNTIMED, Pace
from model.sampler import Draw, sample
from model.step import SampledToken, ScheduledRequest, StepPlan, StepResult, StepStats, TokenLogprob

_PROMPT_ROWS_AT_ONCE = 64       # of prompt log-probabilities: bounds the logits held, 64 x V fp32


class Runner:
    """Runs steps. `dispatcher` belongs to one placement and is replaced with it, None before the first one; the caches
    and `pace`, which is the dispatcher's too, stay.

    An ExpertHost has no blocks and takes part in every step with an empty plan.
    """

    def __init__(self, decoder: MemberModel, dispatcher: Dispatcher | None, num_blocks: int, block_size: int,
                 pace: Pace = UNTIMED, num_state_slots: int = 0) -> None:
        """`grammars` is set by whoever knows the tokenizer, before a request with one comes."""
        self.grammars: GrammarMasks | None = None
        self.decoder = decoder
        self.dispatcher = dispatcher
        self._pace = pace
        self._block_tables = BlockTables()
        self.caches = SequenceCaches(decoder.args, decoder.kernels, decoder.dtype, num_blocks, block_size,
                                     num_state_slots)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, num_tokens_of_member: tuple[int, ...]) -> StepResult:
        """Run one step. Every member calls this with the agreed row counts; an empty plan takes part with 0 rows.

        Changes only the KV slots of the plan's own tokens and the state slots that it writes, so a step that failed can
        be run again. Raises GroupError.
        """
        self._pace.begin_step()
        if self.grammars is not None:
            self.grammars.begin(plan.requests)      # what the sampler needs is computed beside the forward
        dispatcher = self.dispatcher
        assert dispatcher is not None, "steps are those of a group"
        dispatcher.begin_step(num_tokens_of_member)
        caches = self.caches
        batch = build_batch(plan, caches.block_size, caches.num_blocks, caches.num_state_slots, self._block_tables)
        token_ids_T = batch.token_ids_T.to(self.decoder.kernels.device)
        hidden_TD = self.decoder.forward(token_ids_T, batch.attention, caches, dispatcher)
        tokens = self._tokens(plan, batch, hidden_TD)
        expert_rows = tuple(tuple(experts.num_rows_E) for experts in self.decoder.experts)
        return StepResult(plan.epoch_number, plan.step_index, tokens, StepStats(expert_rows, self._pace.end_step()))

    def switch(self, dispatcher: Dispatcher, weights_of_layer: dict[int, ExpertWeights]) -> dict[int, ExpertWeights]:
        """Go on with another placement, between two steps -> the weights that it replaces, by layer too. Freeing those
        can take a while."""
        self.dispatcher = dispatcher
        replaced: dict[int, ExpertWeights] = {}
        for layer, weights in weights_of_layer.items():
            experts = self.decoder.experts[layer]
            replaced[layer], experts.weights = experts.weights, weights
        return replaced

    def _tokens(self, plan: StepPlan, batch: StepBatch, hidden_TD: Tensor) -> tuple[SampledToken, ...]:
        draws = iter(self._draws(plan, batch, hidden_TD))
        return tuple(self._token(request, first_row, hidden_TD, draws)
                     for request, first_row in zip(plan.requests, batch.first_rows_S, strict=True))

    def _draws(self, plan: StepPlan, batch: StepBatch, hidden_TD: Tensor) -> list[Draw]:
        if not batch.sampled_rows:
            return []
        if len(batch.sampled_rows) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD.index_select(0, torch.tensor(batch.sampled_rows, device=hidden_TD.device))
        requests = [request for request in plan.requests if request.sampling is not None]
        return sample(self.decoder.logits(hidden_TD), requests, self.grammars)

    def _token(self, request: ScheduledRequest, first_row: int, hidden_TD: Tensor,
               draws: Iterator[Draw]) -> SampledToken:
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if request.num_prompt_logprobs is not None and request.prompt_targets:
            prompt_logprobs = self._prompt_logprobs(request, first_row, hidden_TD)
        if request.sampling is None:
            return SampledToken(request.request_id, None, None, prompt_logprobs)
        draw = next(draws)
        return SampledToken(request.request_id, draw.token_id, draw.logprob, prompt_logprobs, draw.error)

    def _prompt_logprobs(self, request: ScheduledRequest, first_row: int,
                         hidden_TD: Tensor) -> tuple[TokenLogprob, ...]:
        found: list[TokenLogprob] = []
        for first in range(0, len(request.prompt_targets), _PROMPT_ROWS_AT_ONCE):
            targets = request.prompt_targets[first:first + _PROMPT_ROWS_AT_ONCE]
            begin = first_row + first
            logits_nV = self.decoder.logits(hidden_TD[begin:begin + len(targets)]).cpu().numpy()
            found += [logprobs_of(row_V, target, request.num_prompt_logprobs or 0)
                      for row_V, target in zip(logits_nV, targets, strict=True)]
        return tuple(found)
