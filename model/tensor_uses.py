"""Says which checkpoint tensors fill which weights of a Decoder.

Two layouts of experts are known: one tensor per expert, and the fused 3-D one (`mlp.experts.gate_up_proj` [N, 2 I, D],
`mlp.experts.down_proj` [N, D, I]) that transformers 5 holds in memory and saves with save_original_format=False.

N experts of a layer, I expert intermediate size, D hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from model.args import ModelArgs
from model.attention import PagedAttention
from model.decoder import Decoder, DecoderLayer
from model.kernels.protocol import ExpertWeights, LinearWeight
from model.moe import DenseMlp

Fill = Callable[[Tensor], object]

_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_EXPERT_NAMES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


@dataclass(frozen=True, slots=True)
class TensorUse:
    """Describes a read: a whole tensor of `shape`, or with `entry` one entry of its first dimension, and where it
    goes."""

    name: str
    shape: tuple[int, ...]      # of the whole tensor
    fill: Fill | None           # None: only other members read it
    entry: int | None = None


def tensor_uses(decoder: Decoder, names: set[str],
                experts_of_layer: tuple[tuple[int, ...], ...]) -> Iterator[TensorUse]:
    """Return a use for every tensor that config.json calls for, those that only other members read included.

    names: the checkpoint's, to tell its layout. experts_of_layer: this member's experts of each MoE layer, by slot.
    """
    args = decoder.args
    table = (args.vocab_size, args.hidden_size)
    embedding, output = _EMBEDDING, _OUTPUT
    if args.tie_word_embeddings:        # as transformers does: the one that is there serves as both
        output = _OUTPUT if _OUTPUT in names else _EMBEDDING
        embedding = _EMBEDDING if _EMBEDDING in names else output
    yield TensorUse(embedding, table, decoder.embedding_VD.copy_)
    yield TensorUse(output, table, _rows(decoder.output, 0))
    yield TensorUse("model.norm.weight", (args.hidden_size,), decoder.norm_D.copy_)
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{index}."
        yield from _norm_uses(prefix, layer, args)
        yield from _attention_uses(prefix + "self_attn.", layer.attention, args)
        if isinstance(layer.mlp, DenseMlp):
            yield from _one_expert(prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"),
                                   (args.intermediate_size, args.hidden_size), layer.mlp.expert, 0)
        else:
            experts = layer.mlp.experts
            yield TensorUse(_block(prefix, args, names) + "gate.weight", (args.num_experts, args.hidden_size),
                            _rows(layer.mlp.gate.weight, 0))
            slots = {expert: slot for slot, expert in enumerate(experts_of_layer[experts.layer])}
            yield from expert_uses(args, names, experts.layer, experts.weights, slots)


def _norm_uses(prefix: str, layer: DecoderLayer, args: ModelArgs) -> Iterator[TensorUse]:
    yield TensorUse(prefix + "input_layernorm.weight", (args.hidden_size,), layer.attention_norm_D.copy_)
    yield TensorUse(prefix + "post_attention_layernorm.weight", (args.hidden_size,), layer.mlp_norm_D.copy_)


def _attention_uses(prefix: str, attention: PagedAttention, args: ModelArgs) -> Iterator[TensorUse]:
    first_row = 0
    for name, width in (("q_proj", attention.q_width), ("k_proj", attention.kv_width), ("v_proj", attention.kv_width)):
        yield TensorUse(f"{prefix}{name}.weight", (width, args.hidden_size), _rows(attention.qkv, first_row))
        if attention.qkv_bias_J is not None:
            yield TensorUse(f"{prefix}{name}.bias", (width,),
                            attention.qkv_bias_J[first_row:first_row + width].copy_)
        first_row += width
    yield TensorUse(prefix + "o_proj.weight", (args.hidden_size, attention.q_width), _rows(attention.out, 0))
    if attention.out_bias_D is not None:
        yield TensorUse(prefix + "o_proj.bias", (args.hidden_size,), attention.out_bias_D.copy_)
    for name, weight_d in (("q_norm", attention.q_norm_d), ("k_norm", attention.k_norm_d)):
        if weight_d is not None:
            yield TensorUse(f"{prefix}{name}.weight", (args.head_dim,), weight_d.copy_)


def expert_uses(args: ModelArgs, names: set[str], layer: int, weights: ExpertWeights,
                slots: Mapping[int, int]) -> Iterator[TensorUse]:
    """Return the uses of the experts of one MoE layer (`layer` counts only these), those without a slot here included.

    slots: of `weights`, by expert.
    """
    block = _block(f"model.layers.{args.moe_layers[layer]}.", args, names)
    if f"{block}experts.gate_up_proj" in names:
        yield from _fused_uses(block + "experts.", args, weights, slots)
        return
    for expert in range(args.num_experts):
        yield from _one_expert(f"{block}experts.{expert}.", _EXPERT_NAMES[args.family],
                               (args.moe_intermediate_size, args.hidden_size), weights, slots.get(expert))


def _block(prefix: str, args: ModelArgs, names: set[str]) -> str:
    """Return where a layer's gate and experts are: mixtral's were elsewhere before transformers 5."""
    is_old = args.family == "mixtral" and f"{prefix}mlp.gate.weight" not in names
    return prefix + ("block_sparse_moe." if is_old else "mlp.")


def _one_expert(prefix: str, names: tuple[str, str, str], shape: tuple[int, int], weights: ExpertWeights,
                slot: int | None) -> Iterator[TensorUse]:
    """Return the uses of one expert. names: of gate, up and down. shape: intermediate size, hidden size."""
    loads = (weights.load_gate, weights.load_up, weights.load_down)
    for name, load, size in zip(names, loads, (shape, shape, shape[::-1]), strict=True):
        yield TensorUse(f"{prefix}{name}.weight", size, None if slot is None else _slot(load, slot))


def _fused_uses(prefix: str, args: ModelArgs, weights: ExpertWeights,
                slots: Mapping[int, int]) -> Iterator[TensorUse]:
    count, width, hidden = args.num_experts, args.moe_intermediate_size, args.hidden_size
    gate_up, down = (count, 2 * width, hidden), (count, hidden, width)
    yield TensorUse(prefix + "gate_up_proj", gate_up, None)
    yield TensorUse(prefix + "down_proj", down, None)
    for expert, slot in slots.items():
        yield TensorUse(prefix + "gate_up_proj", gate_up, _gate_up(weights, slot, width), expert)
        yield TensorUse(prefix + "down_proj", down, _slot(weights.load_down, slot), expert)


def _rows(weight: LinearWeight, first_row: int) -> Fill:
    return lambda tensor: weight.load_rows(first_row, tensor)


def _slot(load: Callable[[int, Tensor], None], slot: int) -> Fill:
    return lambda tensor: load(slot, tensor)


def _gate_up(weights: ExpertWeights, slot: int, width: int) -> Fill:
    def fill(tensor_iD: Tensor) -> None:
        weights.load_gate(slot, tensor_iD[:width])
        weights.load_up(slot, tensor_iD[width:])
    return fill
