"""Computes what a device probe times: experts, and a decoder without them, with random weights in the model's real
shapes.

Weights are read from memory: calls go round over more of them than caches hold. What would take too much memory is made
narrower (an expert's intermediate size, the vocabulary), and `scale` says how much more the real one is.

T rows, D hidden size, I expert intermediate size, V vocabulary, J width of q, k and v together, H heads, d head size
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from model.args import ModelArgs
from model.attention import PagedAttention
from model.batch import StepBatch, build_batch
from model.caches import SequenceCaches
from model.decoder import Decoder
from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import Dispatcher, DispatchHandle
from model.dispatch.exchange import RowExchange
from model.dispatch.silent_group import SilentGroup
from model.kernels.protocol import ExpertWeights, Kernels, LinearWeight
from model.moe import SparseMlp
from model.pace import TimedPace
from model.placement import Placement
from model.sampler import sample
from model.step import SamplingSpec, ScheduledRequest, StepPlan

MAX_ROWS = 256
NUM_SEQUENCES = 4           # of the attention that is timed

_NARROW_BYTES = 16 << 20    # an expert or an output layer larger than this is made narrower
_COLD_BYTES = 64 << 20      # at least; twice the last cache where that is known and more
_MAX_COLD_BYTES = 192 << 20
_EXPERTS_PER_CALL = 8       # or fewer, of _CALL_BYTES
_CALL_BYTES = 32 << 20
_MAX_GROUPS, _MAX_LAYERS, _MAX_OUTPUTS, _SHALLOW_LAYERS = 16, 16, 2, 4
_CONTEXT_TOKENS, _BLOCK_SIZE = 1024, 16
_FILL_ROWS = 256
_INIT_STD = 0.02
GREEDY = SamplingSpec(temperature=0.0)


class ExpertGroups:
    """Holds groups of experts of one layer; every call computes all experts of the next group."""

    def __init__(self, args: ModelArgs, dtype: torch.dtype, kernels: Kernels) -> None:
        bytes_per_width = 3 * args.hidden_size * dtype.itemsize
        width = _narrowed(args.moe_intermediate_size, bytes_per_width)
        self.scale = args.moe_intermediate_size / width
        cold_bytes, expert_bytes = _cold_bytes(), width * bytes_per_width
        self.num_experts = max(1, min(_EXPERTS_PER_CALL, _CALL_BYTES // expert_bytes))
        self.bytes_per_call = self.num_experts * expert_bytes
        num_groups = min(_MAX_GROUPS, max(2, -(-cold_bytes // (self.num_experts * expert_bytes))))
        up_ID = _random(width, args.hidden_size, dtype, kernels)
        down_DI = _random(args.hidden_size, width, dtype, kernels)
        self._groups = cycle([self._new_group(width, up_ID, down_DI, kernels) for _ in range(num_groups)])
        self._rows_RD = _random(self.num_experts * MAX_ROWS, args.hidden_size, dtype, kernels)
        self._kernels = kernels

    def _new_group(self, width: int, up_ID: Tensor, down_DI: Tensor, kernels: Kernels) -> ExpertWeights:
        weights = kernels.new_experts(self.num_experts, width, up_ID.shape[1], up_ID.dtype)
        for slot in range(self.num_experts):
            weights.load_gate(slot, up_ID)
            weights.load_up(slot, up_ID)
            weights.load_down(slot, down_DI)
        return weights

    def compute(self, num_rows: int) -> Tensor:
        """Compute `num_rows` rows for each expert of a group."""
        rows_RD = self._rows_RD[:num_rows * self.num_experts]
        return self._kernels.experts(rows_RD, [num_rows] * self.num_experts, next(self._groups))


class Layers:
    """Computes a decoder without experts: its layers, its attention over a cache, its output layer."""

    def __init__(self, args: ModelArgs, dtype: torch.dtype, kernels: Kernels, clock: Callable[[], float],
                 experts: ExpertGroups) -> None:
        vocab_size = _narrowed(args.vocab_size, args.hidden_size * dtype.itemsize)
        self.head_scale = args.vocab_size / vocab_size
        self._period = 1 + args.attention_layers[0]     # layers until all kinds were there
        self._num_layers = self._whole_periods(_num_layers(args, dtype, experts.bytes_per_call))
        args = replace(args, num_layers=self._num_layers, moe_layers=tuple(range(self._num_layers)),
                       linear_layers=tuple(layer for layer in range(self._num_layers) if (layer + 1) % self._period),
                       vocab_size=vocab_size)
        self._decoder = Decoder(args, kernels, dtype, (0,) * self._num_layers)
        self._args, self._dtype, self._kernels = args, dtype, kernels
        self._fill(dtype, kernels)
        self._all = self._decoder.layers
        self._outputs = cycle(self._new_outputs(args, dtype, kernels))
        self._hidden_TD = _random(MAX_ROWS, args.hidden_size, dtype, kernels)
        self._caches = SequenceCaches(args, kernels, dtype, MAX_ROWS, 1, 2 * MAX_ROWS)
        self._experts, self._meter = experts, TimedPace(1.0, clock, clock)     # at full speed it only counts
        placement = _held_by_first(args, args.num_experts - 1)
        dispatcher = AutoDispatcher(RowExchange(kernels, placement, 0, SilentGroup(), self._meter))
        self._dispatcher = _WithoutExperts(dispatcher, experts, self._meter)
        self._batches: dict[int, StepBatch] = {}
        self.context_tokens = min(_CONTEXT_TOKENS, args.sliding_window or _CONTEXT_TOKENS)

    def num_layers(self, num_rows: int) -> int:
        """Return how many layers are timed: many rows keep the processor busy with few weights, so fewer will do."""
        return self._num_layers if num_rows < 64 else min(self._num_layers, self._whole_periods(_SHALLOW_LAYERS))

    def _whole_periods(self, num_layers: int) -> int:
        return -(-num_layers // self._period) * self._period

    @property
    def work_s(self) -> float:
        """Return the seconds of work in all calls, without those of collectives and experts."""
        return self._meter.work_s

    def forward(self, num_rows: int, num_others_rows: int = 0) -> None:
        """Compute all but the experts: for a layer's own rows, each with no context but itself, and for those of
        others whose experts are here. Own rows go to the experts' holders, itself above all, and come back."""
        num_layers, batch = self.num_layers(num_rows), self._batches.get(num_rows)
        if batch is None:
            batch = self._batches[num_rows] = self._new_batch(num_rows)
        self._decoder.layers = self._all[:num_layers]
        token_ids_T = batch.token_ids_T.to(self._hidden_TD.device)
        self._meter.begin_step()
        self._dispatcher.begin_step((num_rows, num_others_rows))
        self._decoder.forward(token_ids_T, batch.attention, self._caches, self._dispatcher)
        self._meter.settle()

    def _new_batch(self, num_rows: int) -> StepBatch:
        """Sequences without earlier tokens that go on from a state all the same, as decodes do."""
        batch = build_batch(_decodes(num_rows, 0, 1), 1, MAX_ROWS, self._caches.num_state_slots)
        reads_S = torch.arange(num_rows, 2 * num_rows, dtype=torch.int32)
        return replace(batch, attention=replace(batch.attention, state_reads_S=reads_S))

    def head(self, num_rows: int) -> None:
        """Compute what a step needs once: its batch, last norm, logits and a greedy draw."""
        plan = _decodes(num_rows, 0, 1)
        self._decoder.output = next(self._outputs)
        self._experts.compute(1)
        self._meter.begin_step()
        build_batch(plan, 1, MAX_ROWS)
        sample(self._decoder.logits(self._hidden_TD[:num_rows]), list(plan.requests))
        self._meter.settle()

    def attention_call(self, context_tokens: int) -> Callable[[], Tensor]:
        """Return a call that attends with a row of each of some sequences with so much context; calls go round over
        layers."""
        args, kernels = self._args, self._kernels
        num_blocks = -(-self.context_tokens // _BLOCK_SIZE)
        layer_bytes = 2 * NUM_SEQUENCES * num_blocks * _BLOCK_SIZE * args.num_kv_heads * args.head_dim \
            * self._dtype.itemsize
        num_layers = max(1, min(_MAX_GROUPS, _cold_bytes() // layer_bytes))
        cache = kernels.new_kv_cache(num_layers, NUM_SEQUENCES * num_blocks, _BLOCK_SIZE, args.num_kv_heads,
                                     args.head_dim, self._dtype)
        cache.fill_(0.01)       # pages that were never written are all the same page, and cached
        plan = _decodes(NUM_SEQUENCES, context_tokens - 1, num_blocks)
        batch = build_batch(plan, _BLOCK_SIZE, NUM_SEQUENCES * num_blocks).attention
        q_THd = _random(NUM_SEQUENCES, args.num_heads * args.head_dim, self._dtype, kernels).view(
            NUM_SEQUENCES, args.num_heads, args.head_dim)
        layers = cycle(cache.unbind(0))
        return lambda: kernels.attention(q_THd, next(layers), batch, args.head_dim ** -0.5, args.sliding_window)

    def _fill(self, dtype: torch.dtype, kernels: Kernels) -> None:
        self._decoder.embedding_VD.normal_(std=_INIT_STD)
        for layer in self._decoder.layers:
            mixer = layer.mixer
            _fill_linear(mixer.qkv if isinstance(mixer, PagedAttention) else mixer.projections, dtype, kernels)
            _fill_linear(mixer.out, dtype, kernels)
            if isinstance(layer.mlp, SparseMlp):
                _fill_linear(layer.mlp.gate.weight, dtype, kernels)
            if isinstance(layer.mlp, SparseMlp) and layer.mlp.shared is not None:
                _fill_linear(layer.mlp.shared.gate, dtype, kernels)
                _fill_expert(layer.mlp.shared.expert, self._args, dtype, kernels)

    def _new_outputs(self, args: ModelArgs, dtype: torch.dtype, kernels: Kernels) -> list[LinearWeight]:
        outputs = [kernels.new_linear(args.vocab_size, args.hidden_size, dtype) for _ in range(_MAX_OUTPUTS)]
        for output in outputs:
            _fill_linear(output, dtype, kernels)
        return outputs


class _WithoutExperts:
    """Is a Dispatcher that gives no rows to the experts here, and returns rows as if they had been computed.

    Other experts run in their place, off the meter: after them caches hold nothing of the layer, as in a real step.
    """

    def __init__(self, dispatcher: Dispatcher, experts: ExpertGroups, meter: TimedPace) -> None:
        self._dispatcher = dispatcher
        self._experts = experts
        self._meter = meter
        self._handle = DispatchHandle([], torch.empty(0))
        self._rows_RD = torch.empty(0)

    @property
    def num_collectives(self) -> int:
        return self._dispatcher.num_collectives

    @property
    def bytes_sent(self) -> int:
        return self._dispatcher.bytes_sent

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._dispatcher.begin_step(num_tokens_of_member)

    def compute_at_once(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> None:
        """Compute nothing: it is timed piece by piece."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        self._rows_RD, self._handle = self._dispatcher.dispatch(layer, x_TD, expert_ids_TK)
        self._meter.settle()
        self._experts.compute(1)
        self._meter.begin()
        return self._rows_RD[:0], DispatchHandle([], self._handle.row_of_TK)

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        return self._dispatcher.combine(layer, self._rows_RD, weights_TK, self._handle)


def _held_by_first(args: ModelArgs, num_held: int) -> Placement:
    """Return the placement of two members of which the first holds so many experts of every layer."""
    return Placement(2, (tuple((int(expert >= num_held),) for expert in range(args.num_experts)),) * args.num_layers)


def _decodes(num_rows: int, num_computed_tokens: int, num_blocks: int) -> StepPlan:
    """Plan one token each of `num_rows` sequences, whose blocks are their own."""
    return StepPlan(0, 0, tuple(
        ScheduledRequest(str(row), (0,), num_computed_tokens, tuple(range(row * num_blocks, (row + 1) * num_blocks)),
                         GREEDY, state_write=row) for row in range(num_rows)))


def _random(num_rows: int, width: int, dtype: torch.dtype, kernels: Kernels) -> Tensor:
    return torch.empty(num_rows, width, dtype=dtype, device=kernels.device).normal_(std=_INIT_STD)


def _fill_expert(expert: ExpertWeights, args: ModelArgs, dtype: torch.dtype, kernels: Kernels) -> None:
    up_ID = _random(args.shared_expert_size, args.hidden_size, dtype, kernels)
    expert.load_gate(0, up_ID)
    expert.load_up(0, up_ID)
    expert.load_down(0, _random(args.hidden_size, args.shared_expert_size, dtype, kernels))


def _fill_linear(weight: LinearWeight, dtype: torch.dtype, kernels: Kernels) -> None:
    """Fill with the same few random rows again and again: one more whole weight would be one more in memory."""
    rows_nK = _random(min(weight.out_features, _FILL_ROWS), weight.in_features, dtype, kernels)
    for first in range(0, weight.out_features, _FILL_ROWS):
        weight.load_rows(first, rows_nK[:weight.out_features - first])


def _narrowed(width: int, bytes_per_width: int) -> int:
    """Return `width`, or the largest multiple of 64 whose weights are within bounds."""
    largest = max(64, _NARROW_BYTES // bytes_per_width // 64 * 64)
    return min(width, largest)


def _cold_bytes() -> int:
    """Return so much memory that reading it again finds little of it in a cache."""
    try:
        cache_bytes = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):       # known on Linux with glibc
        cache_bytes = 0
    return min(max(_COLD_BYTES, 2 * cache_bytes), _MAX_COLD_BYTES)


def _num_layers(args: ModelArgs, dtype: torch.dtype, expert_bytes: int) -> int:
    """Return so many layers that one's attention and gate are no longer in a cache when its turn comes again."""
    heads_width, kv_width = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    layer_bytes = (2 * heads_width + 2 * kv_width + args.num_experts) * args.hidden_size * dtype.itemsize
    return max(1, min(_MAX_LAYERS, -(-_cold_bytes() // (layer_bytes + expert_bytes))))
