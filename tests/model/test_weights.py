"""A member reads its own bytes only, and what is wrong with a checkpoint is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import read_model_args
from model.decoder import Decoder
from model.errors import TensorError
from model.kernels.torch_kernels import TorchExperts, TorchKernels
from model.memory import weights_bytes
from model.moe import SparseMlp
from model.placement import Placement
from model.weights import LoadReport, load_decoder

WriteTiny = Callable[..., Path]
ALONE = Placement(1, (((0,),) * 4,))
THREE = Placement(3, (((0,), (1,), (0, 1), (1,)),))        # rank 2 holds nothing


def load(folder: Path, placement: Placement = ALONE, rank: int = 0,
         dtype: torch.dtype = torch.float32) -> tuple[Decoder, LoadReport]:
    return load_decoder(folder, read_model_args(folder), dtype, TorchKernels(), placement, rank)


def test_a_member_reads_the_bytes_it_needs(write_tiny: WriteTiny) -> None:
    folder = write_tiny()
    args = read_model_args(folder)
    for rank, num_experts in enumerate((2, 3, 0)):
        _, report = load(folder, THREE, rank)
        assert report.bytes_read == report.weights_bytes == weights_bytes(args, 4, [num_experts])


def test_experts_lie_in_their_slots(write_tiny: WriteTiny) -> None:
    whole, part = (load(write_tiny(), placement, rank)[0].layers[1].mlp for placement, rank in ((ALONE, 0), (THREE, 1)))
    assert isinstance(whole, SparseMlp) and isinstance(part, SparseMlp)
    ours, theirs = part.experts.weights, whole.experts.weights
    assert isinstance(ours, TorchExperts) and isinstance(theirs, TorchExperts)
    for slot, expert in enumerate((1, 2, 3)):
        assert torch.equal(ours.gate_up_EiD[slot], theirs.gate_up_EiD[expert])
        assert torch.equal(ours.down_EDI[slot], theirs.down_EDI[expert])


def test_progress_ends_at_the_total(write_tiny: WriteTiny) -> None:
    folder = write_tiny()
    seen: list[tuple[int, int]] = []
    load_decoder(folder, read_model_args(folder), torch.bfloat16, TorchKernels(), THREE, 0,
                 lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == seen[0][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_converted(write_tiny: WriteTiny, dtype: torch.dtype) -> None:
    folder = write_tiny()
    exact, rounded = load(folder)[0], load(folder, dtype=dtype)[0]
    assert torch.equal(rounded.embedding_VD, exact.embedding_VD.to(dtype))


def test_missing_and_extra_tensors_are_named(write_tiny: WriteTiny) -> None:
    gone, alien = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.4.up_proj.weight"
    with pytest.raises(TensorError, match=f"misses 1 tensors: {gone}; instead it has 1 others: {alien}"):
        load(write_tiny({gone: None, alien: torch.ones(2)}))
    with pytest.raises(TensorError, match=f"1 tensors that config.json does not call for: {alien}"):
        load(write_tiny({alien: torch.ones(2)}))


def test_many_missing_tensors_are_abbreviated(write_tiny: WriteTiny) -> None:
    with pytest.raises(TensorError, match=r"misses 11 tensors.*and 3 more"):
        load(write_tiny(num_hidden_layers=3, mlp_only_layers=[0, 2]))


def test_a_member_notices_what_only_another_one_reads(write_tiny: WriteTiny) -> None:
    with pytest.raises(TensorError, match=r"experts\.3\.up_proj"):
        load(write_tiny({"model.layers.1.mlp.experts.3.up_proj.weight": torch.ones(3, 3)}), THREE, 2)


def test_derived_tensors_of_old_checkpoints_are_ignored(write_tiny: WriteTiny) -> None:
    load(write_tiny({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def test_wrong_shape_is_named(write_tiny: WriteTiny) -> None:
    with pytest.raises(TensorError, match=r"q_proj\.weight is \[16, 32\], not \[32, 32\]"):
        load(write_tiny({"model.layers.0.self_attn.q_proj.weight": torch.ones(16, 32)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_named(write_tiny: WriteTiny, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(32)
    bad[17] = value
    with pytest.raises(TensorError, match=r"model\.norm\.weight holds values that are not finite"):
        load(write_tiny({"model.norm.weight": bad}), dtype=dtype)


def test_values_that_a_dtype_cannot_hold_are_named(write_tiny: WriteTiny) -> None:
    folder = write_tiny({"model.norm.weight": torch.full((32,), 1e5)})
    load(folder, dtype=torch.bfloat16)
    with pytest.raises(TensorError, match=r"model\.norm\.weight has values beyond the range of torch.float16"):
        load(folder, dtype=torch.float16)


def test_quantized_dtype_is_named(write_tiny: WriteTiny) -> None:
    with pytest.raises(TensorError, match=r"model\.norm\.weight \(I8\)"):
        load(write_tiny({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
