"""Computes the model: embedding -> layers -> norm -> logits. Families differ only in ModelArgs.

T rows of this step, S rows that need logits, D hidden size, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import ModelArgs
from model.attention import PagedAttention, new_norm
from model.caches import SequenceCaches
from model.delta_net import GatedDeltaNet
from model.dispatch.dispatcher import Dispatcher
from model.kernels.protocol import AttentionBatch, Kernels
from model.moe import DenseMlp, LocalExperts, SparseMlp
from model.rope import RopeTable


class DecoderLayer:
    """Mixes the tokens of a sequence, and transforms each of them, with a norm before either."""

    def __init__(self, args: ModelArgs, mixer: PagedAttention | GatedDeltaNet, mlp: SparseMlp | DenseMlp,
                 kernels: Kernels, dtype: torch.dtype) -> None:
        self.mixer = mixer
        self.mlp = mlp
        self.mixer_norm_D, self.mlp_norm_D = (new_norm(args, args.hidden_size, kernels, dtype) for _ in range(2))


class Decoder:
    """Holds all weights of one member: the shared ones, and the experts that the placement gives it.

    `num_experts_of_layer`: how many local expert slots each MoE layer has here. Weights are filled by model/weights.py.
    """

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype,
                 num_experts_of_layer: tuple[int, ...]) -> None:
        self.args = args
        self.kernels = kernels
        self.dtype = dtype
        self.embedding_VD = torch.empty(args.vocab_size, args.hidden_size, dtype=dtype, device=kernels.device)
        self.layers = [self._new_layer(layer, num_experts_of_layer) for layer in range(args.num_layers)]
        self.norm_D = new_norm(args, args.hidden_size, kernels, dtype)
        self.output = kernels.new_linear(args.vocab_size, args.hidden_size, dtype)
        self.experts: list[LocalExperts] = [layer.mlp.experts for layer in self.layers
                                            if isinstance(layer.mlp, SparseMlp)]     # by MoE layer
        self._rope = RopeTable(args.rope, args.rotary_dim, kernels.device)

    def _new_layer(self, layer: int, num_experts_of_layer: tuple[int, ...]) -> DecoderLayer:
        args, kernels = self.args, self.kernels
        index = args.moe_layer_index(layer)
        mlp = DenseMlp(args, kernels, self.dtype) if index is None else \
            SparseMlp(args, index, num_experts_of_layer[index], kernels, self.dtype)
        mixer = GatedDeltaNet if layer in args.linear_layers else PagedAttention
        return DecoderLayer(args, mixer(args, kernels, self.dtype), mlp, kernels, self.dtype)

    def forward(self, token_ids_T: Tensor, batch: AttentionBatch, caches: SequenceCaches,
                dispatcher: Dispatcher) -> Tensor:
        """Turn token ids, int64 [T] on the device, into hidden [T, D] after the last norm. With T = 0 this member only
        computes for the others."""
        hidden_TD = self.embedding_VD.index_select(0, token_ids_T)
        if not token_ids_T.shape[0]:
            return self._serve_others(hidden_TD, dispatcher)
        add_norm, eps = self.kernels.add_rms_norm, self.args.rms_norm_eps
        cos_sin = self._rope.at(batch.positions_T)
        x_TD = self.kernels.rms_norm(hidden_TD, self.layers[0].mixer_norm_D, eps)
        next_norms = [*(layer.mixer_norm_D for layer in self.layers[1:]), self.norm_D]
        for index, (layer, next_norm_D) in enumerate(zip(self.layers, next_norms, strict=True)):
            mixer, mlp = layer.mixer, layer.mlp
            mixed_TD = (mixer.forward(x_TD, cos_sin, batch, caches.kv_of_layer[index])
                        if isinstance(mixer, PagedAttention)
                        else mixer.forward(x_TD, batch, caches.state_of_layer[index]))
            hidden_TD, x_TD = add_norm(hidden_TD, mixed_TD, layer.mlp_norm_D, eps)
            mlp_TD = mlp.forward(x_TD, dispatcher) if isinstance(mlp, SparseMlp) else mlp.forward(x_TD)
            hidden_TD, x_TD = add_norm(hidden_TD, mlp_TD, next_norm_D, eps)
        return x_TD

    def _serve_others(self, empty_0D: Tensor, dispatcher: Dispatcher) -> Tensor:
        for experts in self.experts:
            experts.serve_others(empty_0D, dispatcher)
        return empty_0D

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Turn hidden [S, D] from forward() into fp32 logits [S, V]."""
        return self.kernels.linear(hidden_SD, self.output, out_dtype=torch.float32)

    @property
    def weights_bytes(self) -> int:
        """Return the bytes held by all weights of this member, in the kernels' layouts."""
        return self.embedding_VD.nbytes + self.norm_D.nbytes + self.output.nbytes + sum(
            layer.mixer_norm_D.nbytes + layer.mlp_norm_D.nbytes + layer.mixer.weights_bytes
            + layer.mlp.weights_bytes for layer in self.layers)
