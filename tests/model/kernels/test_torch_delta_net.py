"""The plain recurrence and convolution are those of transformers, and states lie where the batch says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from model.kernels.protocol import AttentionBatch
from model.kernels.torch_delta_net import causal_conv, gated_delta_rule, sequences_of


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def batch_of_two(state_reads: Tensor) -> AttentionBatch:
    """7 and 5 rows; the first sequence's state is also kept after 2 and 6 of them."""
    none = int32()
    return AttentionBatch(int32(0, 7, 12), none, none, none, none.long(), state_reads_S=state_reads,
                          state_writes_S=int32(1, 2), snapshot_starts_S1=int32(0, 2, 2), snapshot_rows_W=int32(2, 6),
                          snapshot_slots_W=int32(3, 4))


def test_each_sequence_has_its_rows_and_slots() -> None:
    assert list(sequences_of(batch_of_two(int32(-1, 5)))) == [
        (slice(0, 7), -1, {2: 3, 6: 4, 7: 1}), (slice(7, 12), 5, {5: 2})]


def test_recurrence_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    q_THk, k_THk = (torch.randn(12, 3, 8, generator=generator) for _ in range(2))
    v_THv = torch.randn(12, 3, 5, generator=generator)
    log_decay_TH, beta_TH = -torch.rand(12, 3, generator=generator), torch.rand(12, 3, generator=generator)
    states = torch.full((6, 3, 8, 5), float("nan"))
    states[5] = torch.randn(3, 8, 5, generator=generator)
    ours = gated_delta_rule(q_THk, k_THk, v_THv, log_decay_TH.exp(), beta_TH, states, batch_of_two(int32(-1, 5)))

    def theirs(first: int, end: int, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last = torch_recurrent_gated_delta_rule(
            *(x[None, first:end] for x in (q_THk, k_THk, v_THv, log_decay_TH, beta_TH)), initial,
            output_final_state=True, use_qk_l2norm_in_kernel=True)
        return out[0], last[0]

    for first, end, initial, slot in ((0, 7, None, 1), (0, 2, None, 3), (0, 6, None, 4), (7, 12, states[5:6], 2)):
        out, last = theirs(first, end, initial)
        torch.testing.assert_close(ours[first:end], out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states[slot], last, atol=1e-5, rtol=1e-5)
    assert states[0].isnan().all()


def test_convolution_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TC, weight_KC = torch.randn(12, 6, generator=generator), torch.randn(4, 6, generator=generator)
    slots = torch.full((6, 3, 6), float("nan"))
    slots[5] = torch.randn(3, 6, generator=generator)
    before = slots[5].clone()
    ours = causal_conv(x_TC, weight_KC, slots, batch_of_two(int32(-1, 5)), lambda function, x: function(x))
    for first, end, history in ((0, 7, torch.zeros(3, 6)), (7, 12, before)):
        padded = torch.cat((history, x_TC[first:end])).t()[None]
        conv = functional.conv1d(padded, weight_KC.t()[:, None], groups=6)
        torch.testing.assert_close(ours[first:end], functional.silu(conv)[0].t(), atol=1e-5, rtol=1e-5)
    for slot, rows in ((1, x_TC[4:7]), (2, x_TC[9:12]), (4, x_TC[3:6])):
        assert torch.equal(slots[slot], rows)
    assert torch.equal(slots[3], torch.cat((torch.zeros(1, 6), x_TC[:2]))) and torch.equal(slots[5], before)
