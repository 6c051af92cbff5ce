"""A member reads its own bytes only, and what is wrong with a checkpoint is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.args import read_model_args
from model.decoder import Decoder
from model.errors import TensorError
from model.kernels.torch_kernels import TorchExperts, TorchKernels
from model.memory import weights_bytes
from model.moe import SparseMlp
from model.placement import Placement
from model.weights import LoadReport, WeightLoader, load_decoder
from tests.model.tiny_hybrids import save_hybrid, save_multimodal, store_in_fp8

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


FUSED = {"save_original_format": False}
BLOCK = (32, 20)        # fits no size of a tiny hybrid


def held_by(decoder: Decoder) -> list[Tensor]:
    """Return all numbers of a decoder of TorchKernels, however deep they lie."""
    found, open_, seen = [], [decoder], set[int]()
    while open_:
        value = open_.pop()
        if isinstance(value, Tensor):
            found.append(value.float())
        elif id(value) not in seen and not isinstance(value, (str, int, float, TorchKernels, torch.dtype)):
            seen.add(id(value))
            slots = [getattr(value, name) for name in getattr(type(value), "__slots__", ())]
            inner = value if isinstance(value, (list, tuple)) else [*getattr(value, "__dict__", {}).values(), *slots]
            open_ += [part for part in inner if part is not None]
    return found


def load_whole(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, LoadReport]:
    args = read_model_args(folder)
    placement = Placement(1, (((0,),) * args.num_experts,) * args.num_moe_layers)
    return load_decoder(folder, args, dtype, TorchKernels(), placement, 0)


def assert_same(ours: Decoder, theirs: Decoder) -> None:
    pairs = list(zip(held_by(ours), held_by(theirs), strict=True))
    assert len(pairs) > 60 and all(torch.equal(a, b) for a, b in pairs)


def change(folder: Path, changes: dict[str, Tensor | None]) -> Path:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("save", [{}, FUSED], ids=["per expert", "fused"])
def test_of_a_multimodal_checkpoint_the_text_part_is_read(tmp_path: Path, save: dict[str, object],
                                                          caplog: pytest.LogCaptureFixture) -> None:
    """Vision and mtp weights are counted and skipped; what is loaded is what the text model of these weights loads."""
    folder = save_multimodal(tmp_path / "multimodal", save)
    change(folder, {"mtp.fc.weight": torch.ones(4, 8), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)})
    tensors = load_file(folder / "model.safetensors")
    text = save_hybrid(tmp_path / "text", "qwen3_5_moe_text", save)
    change(text, {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()
                  if "language_model" in name or name == "lm_head.weight"})
    with caplog.at_level(logging.INFO):
        ours, report = load_whole(folder)
    theirs, text_report = load_whole(text)
    assert_same(ours, theirs)
    assert (report.bytes_read, report.num_tensors) == (text_report.bytes_read, text_report.num_tensors)
    skipped = [tensor for name, tensor in tensors.items() if name.startswith(("mtp.", "model.visual."))]
    assert len(skipped) > 15 and (f"weights_skipped num_tensors={len(skipped)} bytes={sum(t.nbytes for t in skipped)} "
                                  "prefixes=model.visual.,mtp.") in caplog.text


def test_other_weights_beside_the_text_part_are_named(tmp_path: Path) -> None:
    folder = change(save_multimodal(tmp_path / "it"), {"model.audio.weight": torch.ones(2)})
    with pytest.raises(TensorError, match=r"1 tensors that config.json does not call for: model\.audio\.weight"):
        load_whole(folder)


@pytest.mark.parametrize("save", [{}, FUSED], ids=["per expert", "fused"])
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe"])
def test_fp8_is_dequantized_while_it_is_read(tmp_path: Path, family: str, save: dict[str, object]) -> None:
    """As if the checkpoint had held the numbers that the fp8 ones stand for, each rounded once."""
    folder = save_multimodal(tmp_path / "it", save) if family == "qwen3_5_moe" else save_hybrid(
        tmp_path / "it", family, save)
    fp8 = store_in_fp8(folder, tmp_path / "fp8", BLOCK)
    stored = load_file(fp8 / "model.safetensors")
    assert sum(tensor.dtype is torch.float8_e4m3fn for tensor in stored.values()) >= 30
    change(folder, {name: by_element(weight, stored[name + "_scale_inv"]) for name, weight in stored.items()
                    if weight.dtype is torch.float8_e4m3fn})
    for dtype in (torch.float32, torch.bfloat16):
        (ours, report), (theirs, _) = load_whole(fp8, dtype), load_whole(folder, dtype)
        assert_same(ours, theirs)
        assert report.bytes_read == sum(
            tensor.nbytes for name, tensor in stored.items() if not name.startswith("model.visual."))


def by_element(weight: Tensor, factors: Tensor) -> Tensor:
    rows, columns = (torch.arange(size) // side for size, side in zip(weight.shape[-2:], BLOCK, strict=True))
    return weight.float() * factors[..., rows, :][..., columns]


def fp8_hybrid(folder: Path, save: dict[str, object] | None = None) -> Path:
    return store_in_fp8(save_hybrid(folder / "whole", "qwen3_next", save), folder / "fp8", BLOCK)


OUT = "model.layers.0.linear_attn.out_proj.weight"


@pytest.mark.parametrize(("changes", "named"), [
    ({OUT + "_scale_inv": None}, rf"misses 1 tensors: {OUT}_scale_inv"),
    ({OUT + "_scale_inv": torch.ones(2, 2)}, rf"32 x 20: {OUT}_scale_inv is \[2, 2\] in F32, not \[2, 3\]"),
    ({OUT + "_scale_inv": torch.tensor(1.0)}, rf"{OUT}_scale_inv is \[\] in F32, not \[2, 3\]"),
    ({OUT + "_scale_inv": torch.ones(2, 3, dtype=torch.float8_e8m0fnu)}, rf"{OUT}_scale_inv is \[2, 3\] in F8_E8M0"),
    ({OUT + "_scale_inv": torch.full((2, 3), float("nan"))}, rf"{OUT}_scale_inv holds values that are not finite"),
    ({OUT: torch.full((48, 48), float("nan")).to(torch.float8_e4m3fn)}, rf"{OUT} holds values that are not finite"),
    ({OUT: torch.ones(48, 48)}, rf"does not call for: {OUT}_scale_inv"),
    ({OUT: torch.ones(48, 48).to(torch.float8_e5m2)}, rf"{OUT} \(F8_E5M2\)"),
    ({OUT + ".input_scale": torch.ones(1)}, rf"does not call for: {OUT}.input_scale"),
    ({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}, r"stored in fp8 .*model\.norm\.weight")])
def test_what_is_wrong_with_fp8_is_named(tmp_path: Path, changes: dict[str, Tensor | None], named: str) -> None:
    with pytest.raises(TensorError, match=named):
        load_whole(change(fp8_hybrid(tmp_path), changes))


def test_fp8_that_config_json_does_not_speak_of_is_named(tmp_path: Path) -> None:
    folder = fp8_hybrid(tmp_path)
    (folder / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    with pytest.raises(TensorError, match="stored in fp8 and config.json does not say in which blocks"):
        load_whole(folder)


@pytest.mark.parametrize("save", [{}, FUSED], ids=["per expert", "fused"])
def test_experts_in_fp8_are_read_alone(tmp_path: Path, save: dict[str, object]) -> None:
    """A member that has only experts reads their bytes and factors; the rest may be anything."""
    folder = fp8_hybrid(tmp_path, save)
    args = read_model_args(folder)
    loader = WeightLoader(folder, args, torch.bfloat16, TorchKernels())
    placement = Placement(2, (((0,), (1,), (0,), (0,), (0,), (0,)),) * args.num_moe_layers)
    host, report = loader.load_expert_host(placement, 1)
    whole, _ = load_whole(folder, torch.bfloat16)
    for ours, theirs in zip(host.experts, whole.experts, strict=True):
        assert isinstance(ours.weights, TorchExperts) and isinstance(theirs.weights, TorchExperts)
        assert torch.equal(ours.weights.gate_up_EiD[0], theirs.weights.gate_up_EiD[1])
        assert torch.equal(ours.weights.down_EDI[0], theirs.weights.down_EDI[1])
    num_factors = 2 * (2 * 3 if save else 2 * 1 * 3) // 2 + 2 * 2
    assert report.bytes_read == args.num_moe_layers * (3 * 24 * 48 + 4 * num_factors)
    assert loader.reading_bytes(range(4)) == 24 * 48 * (2 if save else 1) * (1 + 4 + 2)
