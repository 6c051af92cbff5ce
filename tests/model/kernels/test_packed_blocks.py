"""Blocks in one call against the same step by step, bit for bit, and the choice of experts against torch's.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import build_batch
from model.kernels.composed_attention import ComposedAttention
from model.kernels.composed_delta_net import ComposedDeltaNet
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.packed_cpu_library import library_path
from model.kernels.protocol import AttentionWeights, DeltaNetGates, DeltaNetWeights, Kernels, LinearWeight
from model.kernels.torch_kernels import TorchKernels, sort_by_expert
from model.step import ScheduledRequest, StepPlan

pytestmark = pytest.mark.skipif(library_path() is None, reason="no packed kernels for this CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [PackedCpuKernels(2), TorchKernels()] if library_path() is not None else []


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def linear_of(kernels: Kernels, weight_NK: Tensor) -> LinearWeight:
    weight = kernels.new_linear(*weight_NK.shape, weight_NK.dtype)
    weight.load_rows(0, weight_NK)
    return weight


def choose(kernels: Kernels, logits_TN: Tensor, num_choices: int, normalizes: bool = True,
           rounds: bool = False) -> tuple[Tensor, Tensor]:
    """Choose by given logits: the gate is the identity."""
    num_experts = logits_TN.shape[1]
    gate = linear_of(kernels, torch.eye(num_experts, dtype=logits_TN.dtype))
    return kernels.choose_experts(logits_TN, gate, num_choices, normalizes, rounds)


# ==== gate ====


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "num_choices"), [(1, 1), (4, 2), (16, 16), (37, 5), (128, 8), (512, 10)])
@pytest.mark.parametrize(("normalizes", "rounds"), [(True, True), (False, True), (True, False)])
def test_the_choice_is_torch_s(dtype: torch.dtype, num_experts: int, num_choices: int, normalizes: bool,
                               rounds: bool) -> None:
    logits_TN = (3 * torch.randn(150, num_experts)).to(dtype)
    packed, plain = (choose(kernels, logits_TN, num_choices, normalizes, rounds) for kernels in KERNELS)
    assert torch.equal(packed[1], plain[1])
    tolerance = max(1e-6, torch.finfo(dtype).eps if rounds else 0.0)
    torch.testing.assert_close(packed[0], plain[0], rtol=tolerance, atol=1e-9)
    if rounds:
        assert torch.equal(packed[0], packed[0].to(dtype).float())


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equally_likely_experts_those_of_lower_id_are_chosen(kernels: Kernels, dtype: torch.dtype) -> None:
    """Scores of a few values only, as bf16 scores often have them: which expert it is must not be up to the library."""
    logits_TN = torch.randint(0, 3, (300, 40)).to(dtype)
    _, ids_TK = choose(kernels, logits_TN, 6)
    for row_N, ids_K in zip(logits_TN.tolist(), ids_TK.tolist(), strict=True):
        assert ids_K == sorted(sorted(range(40), key=lambda expert: (-row_N[expert], expert))[:6])


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_without_a_number_takes_experts_that_exist(kernels: Kernels, bad: float) -> None:
    """Computed without its own gate row: inf * 0 is no number either."""
    x_TD = torch.full((3, 1), bad)
    weights_TK, ids_TK = kernels.choose_experts(x_TD, linear_of(kernels, torch.zeros(20, 1)), 3, True, False)
    assert ids_TK.tolist() == [[0, 1, 2]] * 3 and bool(weights_TK.isnan().all())


@settings(max_examples=30)
@given(num_rows=st.integers(1, 300), num_experts=st.integers(1, 140), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 99))
def test_a_choice_depends_neither_on_other_rows_nor_on_threads(num_rows: int, num_experts: int, dtype: torch.dtype,
                                                              seed: int) -> None:
    logits_TN = torch.randn(num_rows, num_experts, generator=torch.Generator().manual_seed(seed)).to(dtype)
    num_choices = min(num_experts, 1 + seed % 8)
    together = choose(KERNELS[0], logits_TN, num_choices)
    for kernels in (KERNELS[0], PackedCpuKernels(1), PackedCpuKernels(3)):
        for first, last in ((0, num_rows), (num_rows // 2, num_rows // 2 + 1), (num_rows // 3, num_rows)):
            some = choose(kernels, logits_TN[first:last], num_choices)
            assert all(torch.equal(ours, all_T[first:last]) for ours, all_T in zip(some, together, strict=True))


# ==== experts that are here ====


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 130])
def test_local_experts_are_sort_experts_and_combine(kernels: Kernels, dtype: torch.dtype, num_rows: int) -> None:
    experts = kernels.new_experts(6, 24, 40, dtype)
    for slot in range(6):
        experts.load_gate(slot, torch.randn(24, 40).to(dtype))
        experts.load_up(slot, torch.randn(24, 40).to(dtype))
        experts.load_down(slot, torch.randn(40, 24).to(dtype))
    x_TD = torch.randn(num_rows, 80).to(dtype)[:, 20:60]                # rows that lie apart
    ids_TK = torch.rand(num_rows, 5).argsort(dim=1)[:, :3].sort(dim=1).values       # nobody chooses expert 5
    weights_TK = torch.rand(num_rows, 3)
    order_N, place_N, num_rows_E = sort_by_expert(ids_TK.flatten(), 6)
    outputs_RD = kernels.experts(x_TD[order_N // 3], num_rows_E, experts)
    expected_TD = kernels.combine(outputs_RD, place_N.view(num_rows, 3), weights_TK)
    out_TD, counted_E = kernels.local_experts(x_TD, weights_TK, ids_TK, experts)
    assert counted_E == num_rows_E and torch.equal(out_TD, expected_TD)


@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_an_expert_that_is_not_here_is_refused(bad: int) -> None:
    experts = KERNELS[0].new_experts(4, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="none of the experts here"):
        KERNELS[0].local_experts(torch.ones(2, 16), torch.ones(2, 1), torch.tensor([[0], [bad]]), experts)


def test_two_threads_do_not_share_what_is_kept_between_calls() -> None:
    kernels = KERNELS[0]
    logits = [torch.randn(num_rows, 64) for num_rows in (3, 400, 50, 700)]
    expected = [choose(kernels, logits_TN, 4) for logits_TN in logits]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            for ours, theirs in zip(threads.map(lambda rows: choose(kernels, rows, 4), logits), expected, strict=True):
                assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# ==== the shared expert ====


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 130])
def test_a_shared_expert_is_added_as_its_steps_would(kernels: Kernels, dtype: torch.dtype, num_rows: int) -> None:
    expert = kernels.new_experts(1, 24, 40, dtype)
    expert.load_gate(0, torch.randn(24, 40).to(dtype))
    expert.load_up(0, torch.randn(24, 40).to(dtype))
    expert.load_down(0, torch.randn(40, 24).to(dtype))
    gate, sum_TD = linear_of(kernels, torch.randn(1, 40).to(dtype)), torch.randn(num_rows, 40).to(dtype)
    x_TD = torch.randn(num_rows, 80).to(dtype)[:, 20:60]
    out_TD = kernels.experts(x_TD, (num_rows,), expert)
    expected_TD = sum_TD + kernels.times_sigmoid(out_TD, kernels.linear(x_TD, gate))
    assert torch.equal(kernels.add_shared_expert(sum_TD.clone(), x_TD, expert, gate), expected_TD)


# ==== norm of a sum ====


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_is_fp32", [False, True])
def test_add_rms_norm_is_the_norm_of_the_sum(kernels: Kernels, dtype: torch.dtype, weight_is_fp32: bool) -> None:
    for num_rows, size in ((0, 8), (1, 33), (60, 512)):
        x_TD, delta_TD = torch.randn(num_rows, size).to(dtype), torch.randn(num_rows, size).to(dtype)
        weight_D = torch.randn(size).to(torch.float32 if weight_is_fp32 else dtype)
        expected_TD = x_TD + delta_TD
        sum_TD, normed_TD = kernels.add_rms_norm(x_TD.clone(), delta_TD, weight_D, 1e-6)
        assert torch.equal(sum_TD, expected_TD)
        assert torch.equal(normed_TD, kernels.rms_norm(expected_TD, weight_D, 1e-6))


# ==== attention ====


def attention_weights(kernels: Kernels, dtype: torch.dtype, has_bias: bool, norm_dtype: torch.dtype | None,
                      is_gated: bool, sliding_window: int | None) -> AttentionWeights:
    heads, kv_heads, head_dim, hidden = 6, 2, 20, 40
    width = (heads * (2 if is_gated else 1) + 2 * kv_heads) * head_dim
    bias_J, bias_D = (torch.randn(n).to(dtype) if has_bias else None for n in (width, hidden))
    q_norm_d, k_norm_d = (None if norm_dtype is None else torch.rand(head_dim).to(norm_dtype) for _ in range(2))
    return AttentionWeights(
        linear_of(kernels, torch.randn(width, hidden).to(dtype)),
        linear_of(kernels, torch.randn(hidden, heads * head_dim).to(dtype)), bias_J, bias_D, q_norm_d, k_norm_d,
        heads, kv_heads, head_dim, is_gated, sliding_window, 1e-6)


PLANS = [StepPlan(1, 0, (ScheduledRequest("a", tuple(range(70)), 0, (4, 1, 7, 2, 9)),
                         ScheduledRequest("b", (1, 2, 3), 0, (3,)))),
         StepPlan(1, 1, (ScheduledRequest("b", (4,), 3, (3,)),
                         ScheduledRequest("a", (5,) * 300, 70, (4, 1, 7, 2, 9, *range(10, 30))))),
         StepPlan(1, 2, (ScheduledRequest("b", (6,), 4, (3,)),))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("has_bias", "norms", "is_gated", "rotary_dim", "sliding_window"), [
    (False, "same", False, 20, None), (True, None, False, 20, 9), (False, "fp32", True, 8, None)])
def test_an_attention_block_is_its_steps(dtype: torch.dtype, has_bias: bool, norms: str | None, is_gated: bool,
                                         rotary_dim: int, sliding_window: int | None) -> None:
    kernels = KERNELS[0]
    norm_dtype = None if norms is None else torch.float32 if norms == "fp32" else dtype
    weights = attention_weights(kernels, dtype, has_bias, norm_dtype, is_gated, sliding_window)
    blocks = (kernels.new_attention_block(weights), ComposedAttention(weights, kernels),
              PackedCpuKernels(1).new_attention_block(weights))
    caches = [kernels.new_kv_cache(1, 30, 16, 2, 20, dtype)[0] for _ in blocks]
    for plan in PLANS:
        batch = build_batch(plan, 16, 30).attention
        x_TD = torch.randn(plan.num_tokens, 44).to(dtype)[:, 2:42]
        angles_Td = torch.randn(plan.num_tokens, 2 * rotary_dim)
        cos_sin = (angles_Td[:, :rotary_dim].cos(), angles_Td[:, rotary_dim:].sin())
        before_TD = x_TD.clone()
        once_TD, steps_TD, alone_TD = (block(x_TD, cos_sin, batch, cache)
                                       for block, cache in zip(blocks, caches, strict=True))
        assert torch.equal(once_TD, steps_TD) and torch.equal(caches[0], caches[1])
        assert torch.equal(once_TD, alone_TD) and torch.equal(caches[0], caches[2])
        assert torch.equal(x_TD, before_TD)


def test_a_block_knows_a_new_step_from_the_one_before() -> None:
    """The same rows in another order of sequences, and at other angles: nothing of the last step is taken again."""
    kernels = KERNELS[0]
    weights = attention_weights(kernels, torch.float32, False, None, False, None)
    block, composed = kernels.new_attention_block(weights), ComposedAttention(weights, kernels)
    caches = [kernels.new_kv_cache(1, 30, 16, 2, 20, torch.float32)[0] for _ in range(2)]
    x_TD, first = torch.randn(73, 40), build_batch(PLANS[0], 16, 30).attention
    second = build_batch(replace(PLANS[0], requests=PLANS[0].requests[::-1]), 16, 30).attention
    for batch in (first, second, first):
        for _ in range(2):
            cos_sin = (torch.randn(73, 20), torch.randn(73, 20))
            outs = [some(x_TD, cos_sin, batch, cache) for some, cache in zip((block, composed), caches, strict=True)]
            assert torch.equal(*outs)


# ==== gated DeltaNet ====


def with_states(plan: StepPlan, step: int) -> StepPlan:
    """Sequences go on from the slots that they wrote in the step before; the first keeps a state on the way."""
    def with_state(request: ScheduledRequest) -> ScheduledRequest:
        first = {"a": 0, "b": 2}[request.request_id]
        return request._replace(state_read=first + (step + 1) % 2 if request.num_computed_tokens else None,
                       state_write=first + step % 2,
                       state_snapshots=((33, 4 + step),) if len(request.token_ids) > 33 else ())
    return replace(plan, requests=tuple(map(with_state, plan.requests)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_heads", "heads", "key_dim", "value_dim"), [(2, 4, 8, 12), (1, 2, 16, 64), (1, 1, 1, 1)])
def test_a_delta_net_block_is_its_steps(dtype: torch.dtype, key_heads: int, heads: int, key_dim: int,
                                        value_dim: int) -> None:
    kernels, hidden = KERNELS[0], 40
    conv_width, value_width = 2 * key_heads * key_dim + heads * value_dim, heads * value_dim
    weights = DeltaNetWeights(
        linear_of(kernels, torch.randn(conv_width + value_width + 2 * heads, hidden).to(dtype)),
        linear_of(kernels, torch.randn(hidden, value_width).to(dtype)), torch.randn(4, conv_width).to(dtype),
        DeltaNetGates(-torch.rand(heads), torch.randn(heads)), torch.rand(value_dim).to(dtype), key_heads, heads,
        key_dim, value_dim, 1e-6)
    blocks = (kernels.new_delta_net_block(weights), ComposedDeltaNet(weights, kernels),
              PackedCpuKernels(1).new_delta_net_block(weights))
    states = [kernels.new_delta_net_states(1, 7, heads, key_dim, value_dim, 4, conv_width, dtype)[0] for _ in blocks]
    for step, plan in enumerate(PLANS):
        batch = build_batch(with_states(plan, step), 16, 30, 7).attention
        x_TD = torch.randn(plan.num_tokens, 44).to(dtype)[:, 2:42]
        outs = [block(x_TD, batch, state) for block, state in zip(blocks, states, strict=True)]
        for out_TD, state in zip(outs[1:], states[1:], strict=True):
            assert torch.equal(out_TD, outs[0])
            assert torch.equal(state.recurrent_NHkv, states[0].recurrent_NHkv)
            assert torch.equal(state.conv_NcC, states[0].conv_NcC)
