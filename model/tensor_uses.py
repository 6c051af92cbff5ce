"""Says which checkpoint tensors fill which weights of a Decoder.

Two layouts of experts are known: one tensor per expert, and the fused 3-D one (`mlp.experts.gate_up_proj` [N, 2 I, D],
`mlp.experts.down_proj` [N, D, I]) that transformers 5 holds in memory and saves with save_original_format=False.

N experts of a layer, I expert intermediate size, D hidden size, K convolution kernel size, C its channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.args import LinearAttentionArgs, ModelArgs
from model.attention import PagedAttention
from model.decoder import Decoder, DecoderLayer
from model.delta_net import GatedDeltaNet
from model.families import FAMILIES
from model.kernels.protocol import ExpertWeights, LinearWeight
from model.moe import DenseMlp, SharedExpert

Fill = Callable[[Tensor], object]

_OUTPUT = "lm_head.weight"
_MLP_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class TensorUse:
    """Describes a read: a whole tensor of `shape`, or with `entry` one entry of its first dimension, and where it
    goes."""

    name: str
    shape: tuple[int, ...]      # of the whole tensor
    fill: Fill | None           # None: only other members read it
    entry: int | None = None
    in_fp32: bool = False       # not rounded to the model's dtype on the way


def text_prefix(names: set[str]) -> str:
    """Return what the language model's tensors begin with: a multimodal checkpoint holds them one level deeper."""
    return "model.language_model." if any(name.startswith("model.language_model.") for name in names) else "model."


def tensor_uses(decoder: Decoder, names: set[str],
                experts_of_layer: tuple[tuple[int, ...], ...]) -> Iterator[TensorUse]:
    """Return a use for every tensor that config.json calls for, those that only other members read included.

    names: the checkpoint's, to tell its layout. experts_of_layer: this member's experts of each MoE layer, by slot.
    """
    args = decoder.args
    table = (args.vocab_size, args.hidden_size)
    base = text_prefix(names)
    embedding, output = base + "embed_tokens.weight", _OUTPUT
    if args.tie_word_embeddings:        # as transformers does: the one that is there serves as both
        output = _OUTPUT if _OUTPUT in names else embedding
        embedding = embedding if embedding in names else output
    yield TensorUse(embedding, table, decoder.embedding_VD.copy_)
    yield TensorUse(output, table, _rows(decoder.output, 0))
    yield TensorUse(base + "norm.weight", (args.hidden_size,), _norm(decoder.norm_D, args))
    for index, layer in enumerate(decoder.layers):
        prefix = f"{base}layers.{index}."
        yield from _norm_uses(prefix, layer, args)
        if isinstance(layer.mixer, PagedAttention):
            yield from _attention_uses(prefix + "self_attn.", layer.mixer, args)
        else:
            yield from _delta_net_uses(prefix + "linear_attn.", layer.mixer, args)
        if isinstance(layer.mlp, DenseMlp):
            yield from _one_expert(prefix + "mlp.", _MLP_NAMES, (args.intermediate_size, args.hidden_size),
                                   layer.mlp.expert, 0)
        else:
            experts, block = layer.mlp.experts, _block(prefix, args, names)
            yield TensorUse(block + "gate.weight", (args.num_experts, args.hidden_size),
                            _rows(layer.mlp.gate.weight, 0))
            if layer.mlp.shared is not None:
                yield from _shared_uses(block, layer.mlp.shared, args)
            slots = {expert: slot for slot, expert in enumerate(experts_of_layer[experts.layer])}
            yield from expert_uses(args, names, experts.layer, experts.weights, slots)


def _norm_uses(prefix: str, layer: DecoderLayer, args: ModelArgs) -> Iterator[TensorUse]:
    size = (args.hidden_size,)
    yield TensorUse(prefix + "input_layernorm.weight", size, _norm(layer.mixer_norm_D, args))
    yield TensorUse(prefix + "post_attention_layernorm.weight", size, _norm(layer.mlp_norm_D, args))


def _attention_uses(prefix: str, attention: PagedAttention, args: ModelArgs) -> Iterator[TensorUse]:
    first_row = 0
    for name, width in (("q_proj", attention.q_width), ("k_proj", attention.kv_width), ("v_proj", attention.kv_width)):
        gate = attention.gate_width if name == "q_proj" else 0
        fill = _query_and_gate(attention) if gate else _rows(attention.qkv, first_row)
        yield TensorUse(f"{prefix}{name}.weight", (width + gate, args.hidden_size), fill)
        if attention.qkv_bias_J is not None:
            bias_J = attention.qkv_bias_J
            yield TensorUse(f"{prefix}{name}.bias", (width + gate,), _query_and_gate_bias(attention, bias_J)
                            if gate else bias_J[first_row:first_row + width].copy_)
        first_row += width
    yield TensorUse(prefix + "o_proj.weight", (args.hidden_size, attention.q_width), _rows(attention.out, 0))
    if attention.out_bias_D is not None:
        yield TensorUse(prefix + "o_proj.bias", (args.hidden_size,), attention.out_bias_D.copy_)
    for name, weight_d in (("q_norm", attention.q_norm_d), ("k_norm", attention.k_norm_d)):
        if weight_d is not None:
            yield TensorUse(f"{prefix}{name}.weight", (args.head_dim,), _norm(weight_d, args))


def _delta_net_uses(prefix: str, layer: GatedDeltaNet, args: ModelArgs) -> Iterator[TensorUse]:
    sizes, hidden = layer.sizes, args.hidden_size
    conv, value, heads = sizes.conv_width, sizes.value_width, sizes.num_value_heads
    if FAMILIES[args.family].splits_linear_projections:
        first_row = 0
        for name, width in (("qkv", conv), ("z", value), ("b", heads), ("a", heads)):
            yield TensorUse(f"{prefix}in_proj_{name}.weight", (width, hidden), _rows(layer.projections, first_row))
            first_row += width
    else:
        yield TensorUse(prefix + "in_proj_qkvz.weight", (conv + value, hidden), _by_key_head(
            layer.projections, sizes, (sizes.key_head_dim, sizes.key_head_dim, _values(sizes), _values(sizes)), 0))
        heads_of_key = heads // sizes.num_key_heads
        yield TensorUse(prefix + "in_proj_ba.weight", (2 * heads, hidden), _by_key_head(
            layer.projections, sizes, (heads_of_key, heads_of_key), conv + value))
    yield TensorUse(prefix + "conv1d.weight", (conv, 1, sizes.conv_kernel_size),
                    lambda weight_C1K: layer.conv_weight_KC.copy_(weight_C1K[:, 0].t()))
    yield TensorUse(prefix + "A_log", (heads,), lambda log_H: layer.gates.rate_H.copy_(-log_H.exp()), in_fp32=True)
    yield TensorUse(prefix + "dt_bias", (heads,), layer.gates.bias_H.copy_, in_fp32=True)
    yield TensorUse(prefix + "norm.weight", (sizes.value_head_dim,), layer.norm_v.copy_)
    yield TensorUse(prefix + "out_proj.weight", (hidden, value), _rows(layer.out, 0))


def _shared_uses(block: str, shared: SharedExpert, args: ModelArgs) -> Iterator[TensorUse]:
    yield from _one_expert(block + "shared_expert.", _MLP_NAMES, (args.shared_expert_size, args.hidden_size),
                           shared.expert, 0)
    yield TensorUse(block + "shared_expert_gate.weight", (1, args.hidden_size), _rows(shared.gate, 0))


def expert_uses(args: ModelArgs, names: set[str], layer: int, weights: ExpertWeights,
                slots: Mapping[int, int]) -> Iterator[TensorUse]:
    """Return the uses of the experts of one MoE layer (`layer` counts only these), those without a slot here included.

    slots: of `weights`, by expert.
    """
    block = _block(f"{text_prefix(names)}layers.{args.moe_layers[layer]}.", args, names)
    if f"{block}experts.gate_up_proj" in names:
        yield from _fused_uses(block + "experts.", args, weights, slots)
        return
    for expert in range(args.num_experts):
        yield from _one_expert(f"{block}experts.{expert}.", FAMILIES[args.family].expert_names,
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


def _norm(weight: Tensor, args: ModelArgs) -> Fill:
    """A norm that is centred at zero is held with the 1 added."""
    return (lambda tensor: weight.copy_(1.0 + tensor.float())) if args.zero_centered_norms else weight.copy_


def _query_and_gate(attention: PagedAttention) -> Fill:
    """q_proj holds the query and then the gate of each head; the gates go behind the values."""
    gate_row = attention.q_width + 2 * attention.kv_width

    def fill(weight_JD: Tensor) -> None:
        query, gate = _halves(weight_JD, attention)
        attention.qkv.load_rows(0, query)
        attention.qkv.load_rows(gate_row, gate)
    return fill


def _query_and_gate_bias(attention: PagedAttention, bias_J: Tensor) -> Fill:
    gate_row = attention.q_width + 2 * attention.kv_width

    def fill(stored_J: Tensor) -> None:
        query, gate = _halves(stored_J[:, None], attention)
        bias_J[:attention.q_width].copy_(query[:, 0])
        bias_J[gate_row:].copy_(gate[:, 0])
    return fill


def _halves(weight_JD: Tensor, attention: PagedAttention) -> tuple[Tensor, Tensor]:
    pairs = weight_JD.reshape(attention.num_heads, 2, attention.head_dim, -1)
    return pairs[:, 0].reshape(attention.q_width, -1), pairs[:, 1].reshape(attention.q_width, -1)


def _values(sizes: LinearAttentionArgs) -> int:
    """Return the rows of the values that belong to one key head."""
    return sizes.value_width // sizes.num_key_heads


def _by_key_head(weight: LinearWeight, sizes: LinearAttentionArgs, widths: tuple[int, ...], first_row: int) -> Fill:
    """Rows lie key head after key head, each with its parts of `widths`; here they lie part after part."""
    def fill(stored_JD: Tensor) -> None:
        row, heads = first_row, stored_JD.reshape(sizes.num_key_heads, sum(widths), -1)
        for part in torch.split(heads, list(widths), dim=1):
            rows_nD = part.reshape(-1, part.shape[-1])
            weight.load_rows(row, rows_nD)
            row += rows_nD.shape[0]
    return fill


def _rows(weight: LinearWeight, first_row: int) -> Fill:
    return lambda tensor: weight.load_rows(first_row, tensor)


def _slot(load: Callable[[int, Tensor], None], slot: int) -> Fill:
    return lambda tensor: load(slot, tensor)


def _gate_up(weights: ExpertWeights, slot: int, width: int) -> Fill:
    def fill(tensor_iD: Tensor) -> None:
        weights.load_gate(slot, tensor_iD[:width])
        weights.load_up(slot, tensor_iD[width:])
    return fill
