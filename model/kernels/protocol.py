"""Says what a device must be able to compute. One Protocol, two implementations:

`TorchKernels` (model/kernels/torch_kernels.py): plain torch on any device; the oracle of the other.
`PackedCpuKernels` (model/kernels/packed_cpu.py): C micro-kernels on packed weights, for CPUs; every output element is
one fp32 FMA chain in ascending k, so a row's result cannot depend on the rows beside it, on threads or on the CPU's
vector width.

T tokens, K input features, N output features, D hidden size, I expert intermediate size, E experts on this member,
R rows sorted by local expert, H query heads, G key/value heads, d head size, B block size of the KV cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LinearWeight(Protocol):
    """Holds a weight [N, K] in the kernels' layout. It is filled once at load, some rows at a time (q, k, v fused)."""

    out_features: int
    in_features: int
    nbytes: int

    def load_rows(self, first_row: int, weight_nK: Tensor) -> None:
        """Copy rows [n, K] of a checkpoint tensor to rows first_row .. first_row + n."""


class ExpertWeights(Protocol):
    """Holds the experts of one layer on this member: gate and up [E, I, D], down [E, D, I], slot by slot."""

    num_experts: int
    nbytes: int

    def load_gate(self, slot: int, weight_ID: Tensor) -> None: ...

    def load_up(self, slot: int, weight_ID: Tensor) -> None: ...

    def load_down(self, slot: int, weight_DI: Tensor) -> None: ...

    def copy_slot(self, slot: int, source: ExpertWeights, source_slot: int) -> None:
        """Take an expert from other weights of the same sizes and dtype."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Says where the T rows of a step sit: S sequences, one after the other, in the plan's order. All int32, on CPU.

    Row i of sequence s is query position context_lens_S[s] - query_lens_S[s] + i; it sees keys 0..that position
    (or the last `sliding_window` of them).
    """

    query_starts_S1: Tensor     # [S + 1] prefix sums of query_lens
    context_lens_S: Tensor      # [S] tokens in the cache after this step's were written
    block_tables_SM: Tensor     # [S, M] block ids, padded with 0
    positions_T: Tensor         # [T]
    slots_T: Tensor             # [T] int64: block id * block size + offset, where row's key and value are written
    state_reads_S: Tensor | None = None     # [S] state slot that a sequence goes on from; -1: it begins
    state_writes_S: Tensor | None = None    # [S] state slot for what comes out, another one; None: no such layers
    snapshot_starts_S1: Tensor | None = None    # [S + 1] prefix sums: each sequence's part of the next two
    snapshot_rows_W: Tensor | None = None       # [W] rows of the sequence after which its state is kept too, ascending
    snapshot_slots_W: Tensor | None = None      # [W] the slot for it


@dataclass(frozen=True, slots=True)
class DeltaNetState:
    """Holds what sequences own in one gated DeltaNet layer, slot by slot."""

    recurrent_NHkv: Tensor      # fp32 [slots, value heads, key head size, value head size]
    conv_NcC: Tensor            # [slots, rows that the convolution looks back, channels], oldest first


@dataclass(frozen=True, slots=True)
class DeltaNetGates:
    """Says how fast a head forgets: decay = exp(rate * softplus(a + bias)), fp32 [H] each; rate <= 0."""

    rate_H: Tensor
    bias_H: Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Holds what one layer's attention is made of. Rows of `qkv`: q, k, v and, if gated, the gate of the output."""

    qkv: LinearWeight
    out: LinearWeight
    qkv_bias_J: Tensor | None
    out_bias_D: Tensor | None
    q_norm_d: Tensor | None
    k_norm_d: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_gated: bool
    sliding_window: int | None
    eps: float                  # of the norms

    @property
    def scale(self) -> float:
        return float(self.head_dim ** -0.5)


class AttentionBlock(Protocol):
    """Computes one layer's attention, from its input to its output."""

    def __call__(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: Tensor) -> Tensor:
        """Write the rows' keys and values to `cache`, this layer's slice of new_kv_cache(), then attend -> [T, D].

        cos and sin fp32 [T, r]: see Kernels.rope."""


@dataclass(frozen=True, slots=True)
class DeltaNetWeights:
    """Holds what one gated DeltaNet layer is made of. Rows of `projections`: q, k, v, the gate of the output, b, a."""

    projections: LinearWeight
    out: LinearWeight
    conv_weight_KC: Tensor
    gates: DeltaNetGates
    norm_v: Tensor
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    eps: float                  # of the norm


class DeltaNetBlock(Protocol):
    """Computes one gated DeltaNet layer, from its input to its output."""

    def __call__(self, x_TD: Tensor, batch: AttentionBatch, state: DeltaNetState) -> Tensor:
        """Turn x [T, D] into [T, D]. Goes on from the sequences' states and writes what they become to other slots."""


class Kernels(Protocol):
    name: str                   # bit-identical numbers are promised between members whose name and dtype agree
    device: torch.device
    kv_block_dim: int           # of one layer's KV cache: the dimension that counts blocks

    @property
    def num_threads(self) -> int:
        """Return the threads of the CPU that a call runs on, unless `run_on` has said otherwise."""

    def run_on(self, num_threads: int) -> None:
        """Let the next calls run on so many threads; where there is a choice. Results stay the same."""

    def on_one_thread(self) -> Kernels:
        """Return the same for who gives way to calls on other threads: weights made by it are packed on one thread."""

    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight: ...

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None,
               out_dtype: torch.dtype | None = None) -> Tensor:
        """Compute x [T, K] @ weight.T [K, N] (+ bias) -> [T, N], accumulated in fp32, in out_dtype or that of x."""

    def new_experts(self, num_experts: int, intermediate_size: int, hidden_size: int,
                    dtype: torch.dtype) -> ExpertWeights: ...

    def experts(self, rows_RD: Tensor, num_rows_E: Sequence[int], weights: ExpertWeights) -> Tensor:
        """Compute SwiGLU of each row with its own expert: down(silu(gate(x)) * up(x)) -> [R, D], dtype of rows.

        Rows are sorted by slot; num_rows_E[slot] says how many belong to each, zeros included.
        The product silu(gate) * up is made in fp32 and rounded once to the dtype of rows.
        """

    def choose_experts(self, x_TD: Tensor, weight: LinearWeight, num_choices: int, normalizes: bool,
                       rounds: bool) -> tuple[Tensor, Tensor]:
        """Choose for x [T, D] -> (weights fp32 [T, K], expert ids int64 [T, K]), each row ascending in expert id.

        Scores are rounded to the dtype of x before the softmax, as transformers does. Of equally likely experts those
        of lower id are chosen. normalizes: weights add up to 1; rounds: they are rounded to the dtype of x.
        """

    def local_experts(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                      experts: ExpertWeights) -> tuple[Tensor, list[int]]:
        """Compute a layer all of whose experts are here, in the slots of their ids -> (weighted sums [T, D], rows of
        each expert): the bits of `experts` on sorted rows, then `combine`. Choices as choose_experts makes them."""

    def add_shared_expert(self, sum_TD: Tensor, x_TD: Tensor, expert: ExpertWeights, gate: LinearWeight) -> Tensor:
        """Compute sum + expert(x) * sigmoid(gate(x)) -> [T, D], which may lie where `sum` was. gate(x) is [T, 1]."""

    def combine(self, rows_RD: Tensor, row_of_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum each token's expert outputs by weight: sum_k weights[t, k] * rows[row_of[t, k]] -> [T, D], as rows.

        Added in the order of the columns (the caller sorts them by expert id), in fp32, rounded once.
        rows [R, D], row_of int64 [T, K], weights fp32 [T, K].
        """

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Compute x * rsqrt(mean(x^2) + eps) in fp32, rounded to the dtype of x, then times weight, over the last dim.

        As transformers' Qwen3MoeRMSNorm and MixtralRMSNorm compute it. x may be [T, H, d] (QK norm). An fp32 weight
        beside x of another dtype is multiplied before the rounding, as Qwen3NextRMSNorm does."""

    def add_rms_norm(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Compute x + delta in the dtype of both -> (the sum, its rms_norm). The sum may lie where x was."""

    def gated_rms_norm(self, x_THd: Tensor, gate_THd: Tensor, weight_d: Tensor, eps: float) -> Tensor:
        """rms_norm(x) * silu(gate), the product in fp32, rounded once -> dtype of x."""

    def times_sigmoid(self, x_TN: Tensor, gate_TN: Tensor) -> Tensor:
        """x * sigmoid(gate) in fp32, rounded once -> dtype of x. gate may be [T, 1]."""

    def new_delta_net_states(self, num_layers: int, num_slots: int, num_value_heads: int, key_head_dim: int,
                             value_head_dim: int, conv_kernel_size: int, conv_width: int,
                             dtype: torch.dtype) -> list[DeltaNetState]:
        """States of `num_slots` slots, by layer. What a slot holds before it is written means nothing."""

    def causal_conv(self, x_TC: Tensor, weight_KC: Tensor, state: DeltaNetState, batch: AttentionBatch) -> Tensor:
        """Depthwise convolution of every row with the K - 1 before it in its sequence, then silu -> [T, C], as x.

        weight [K, C]: the newest row's is last. Added in fp32 from the oldest row on, rounded once. Reads and writes
        `state.conv_NcC`.
        """

    def gated_delta_rule(self, qkv_TC: Tensor, ba_TJ: Tensor, gates: DeltaNetGates, state: DeltaNetState,
                         batch: AttentionBatch) -> Tensor:
        """The recurrence of gated DeltaNet, token by token in fp32 -> [T, H, v], dtype of qkv.

        qkv: queries and keys of the key heads, values of the value heads, side by side; ba: b and a of every value
        head, beta = sigmoid(b), `gates` make the decay of a. Queries and keys are normalized here. Reads and writes
        `state.recurrent_NHkv`.
        """

    def new_attention_block(self, weights: AttentionWeights) -> AttentionBlock: ...

    def new_delta_net_block(self, weights: DeltaNetWeights) -> DeltaNetBlock: ...

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        """Rotate-half rotary embedding, x [T, H, d], cos and sin fp32 [T, r] (both halves): the first r dimensions of a
        head are rotated, the others stay."""

    def new_kv_cache(self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                     dtype: torch.dtype) -> Tensor:
        """Return a zeroed tensor whose first dimension is the layer; the rest is the implementation's own layout."""

    def write_kv(self, cache: Tensor, k_TGd: Tensor, v_TGd: Tensor, batch: AttentionBatch) -> None:
        """Store the keys and values of this step's rows. `cache` is one layer's slice of new_kv_cache()."""

    def attention(self, q_THd: Tensor, cache: Tensor, batch: AttentionBatch, scale: float,
                  sliding_window: int | None) -> Tensor:
        """Compute causal attention of this step's rows over the cached keys -> [T, H, d], dtype of q.

        Keys are taken in position order with a split that depends on positions only, softmax and sums in fp32, so a
        row's result does not depend on chunking or on other sequences.
        """
