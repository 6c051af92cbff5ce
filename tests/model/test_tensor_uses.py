"""A member reads the tensors that it needs, in both layouts of experts and under the names of both families."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from model.args import parse_model_args
from model.decoder import Decoder
from model.kernels.torch_kernels import TorchExperts, TorchKernels
from model.moe import SparseMlp
from model.tensor_uses import TensorUse, tensor_uses

HELD = ((1, 3),)        # of the four experts of the one MoE layer
EXPERTS = "model.layers.1.mlp.experts."
FUSED = {EXPERTS + "gate_up_proj", EXPERTS + "down_proj"}
OLD_MIXTRAL = "model.layers.0.block_sparse_moe."


def _decoder(config: dict[str, object], held: tuple[tuple[int, ...], ...] = HELD) -> Decoder:
    return Decoder(parse_model_args(config), TorchKernels(), torch.float32, tuple(map(len, held)))


def _experts(uses: Iterable[TensorUse]) -> list[TensorUse]:
    return [use for use in uses if ".experts." in use.name]


def test_every_tensor_is_named_once_and_only_own_experts_are_filled(tiny_config: dict[str, object]) -> None:
    uses = list(tensor_uses(_decoder(tiny_config), set(), HELD))
    assert len({use.name for use in uses}) == len(uses) == 3 + 2 * (2 + 6) + 3 + 1 + 4 * 3
    filled = {use.name.removeprefix(EXPERTS) for use in _experts(uses) if use.fill is not None}
    assert filled == {f"{expert}.{name}_proj.weight" for expert in (1, 3) for name in ("gate", "up", "down")}
    assert all(use.fill is not None for use in uses if ".experts." not in use.name)
    assert {use.shape for use in _experts(uses)} == {(16, 32), (32, 16)}


def test_fused_experts_are_read_by_entry(tiny_config: dict[str, object]) -> None:
    uses = _experts(tensor_uses(_decoder(tiny_config), FUSED, HELD))
    assert {use.name for use in uses} == FUSED and {use.shape for use in uses} == {(4, 32, 32), (4, 32, 16)}
    assert [use.entry for use in uses if use.fill is not None] == [1, 1, 3, 3]
    assert all(use.entry is None for use in uses if use.fill is None)


def test_both_layouts_fill_the_same_slots(tiny_config: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(shape, generator=generator) for shape in ((4, 32, 32), (4, 32, 16)))
    found = []
    for names in (set(), FUSED):
        decoder = _decoder(tiny_config)
        for use in _experts(tensor_uses(decoder, names, HELD)):
            if use.fill is None:
                continue
            if use.entry is not None:
                use.fill((down if "down" in use.name else gate_up)[use.entry])
                continue
            expert, kind = use.name.removeprefix(EXPERTS).split(".")[:2]
            whole = {"gate_proj": gate_up[:, :16], "up_proj": gate_up[:, 16:], "down_proj": down}[kind]
            use.fill(whole[int(expert)])
        mlp = decoder.layers[1].mlp
        assert isinstance(mlp, SparseMlp) and isinstance(mlp.experts.weights, TorchExperts)
        found.append(mlp.experts.weights)
    assert torch.equal(found[0].gate_up_EiD, found[1].gate_up_EiD) and torch.equal(found[0].down_EDI, found[1].down_EDI)
    assert torch.equal(found[0].down_EDI[1], down[3])


@pytest.mark.parametrize(("names", "read"), [
    (set(), ["model.embed_tokens.weight"] * 2),
    ({"lm_head.weight"}, ["lm_head.weight"] * 2),
    ({"model.embed_tokens.weight", "lm_head.weight"}, ["model.embed_tokens.weight", "lm_head.weight"])])
def test_tied_embeddings_are_read_from_what_is_there(tiny_config: dict[str, object], names: set[str],
                                                     read: list[str]) -> None:
    uses = tensor_uses(_decoder(tiny_config | {"tie_word_embeddings": True}), names, HELD)
    assert [use.name for use in uses if "embed" in use.name or "lm_head" in use.name] == read


def test_mixtral_has_its_experts_where_its_gate_is(tiny_config: dict[str, object]) -> None:
    config = {key: value for key, value in tiny_config.items()
              if key not in ("mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts")}
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    held = ((0,), (0,))
    old = [use.name for use in tensor_uses(_decoder(config, held), set(), held) if "layers.0." in use.name]
    assert OLD_MIXTRAL + "gate.weight" in old and OLD_MIXTRAL + "experts.3.w2.weight" in old
    new_names = {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}
    new = [use.name for use in tensor_uses(_decoder(config, held), new_names, held)]
    assert "model.layers.0.mlp.experts.3.w2.weight" in new and not any("block_sparse" in name for name in new)
