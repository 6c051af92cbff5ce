"""Gives a member the experts of another placement. Only layers whose experts change on it are touched.

A member that goes on serving has them prepared beside the running ones, to be put in between two steps: until then they
exist twice. One that does nothing else has them exchanged in place, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.expert_host import MemberModel
from model.kernels.protocol import ExpertWeights
from model.moe import new_experts
from model.placement import Placement
from model.weights import LayerFill, Progress, WeightLoader


@dataclass(frozen=True, slots=True)
class ExpertChange:
    """Says what one member's experts are and shall be."""

    running: Placement
    wanted: Placement
    rank: int                           # in `wanted`
    running_rank: int | None = None     # in `running`; None: the same

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the MoE layers in which this member's experts change."""
        return tuple(layer for layer in range(self.wanted.num_layers) if self._before(layer) != self._after(layer))

    @property
    def num_slots(self) -> int:
        """Return how many expert copies exist beside the running ones until the swap."""
        return sum(len(self._after(layer)) for layer in self.layers)

    def kept_slots(self, layer: int) -> dict[int, int]:
        """Return, of the experts that stay here: slot -> slot that it has now."""
        before = {expert: slot for slot, expert in enumerate(self._before(layer))}
        return {slot: before[expert] for slot, expert in enumerate(self._after(layer)) if expert in before}

    def read_slots(self, layer: int) -> dict[int, int]:
        """Return, of the experts that come: expert -> slot."""
        before = set(self._before(layer))
        return {expert: slot for slot, expert in enumerate(self._after(layer)) if expert not in before}

    def slots(self, layer: int) -> dict[int, int]:
        """Return, of all experts that are wanted: expert -> slot."""
        return {expert: slot for slot, expert in enumerate(self._after(layer))}

    def num_experts(self, layer: int) -> int:
        return len(self._after(layer))

    def num_more_experts(self, layer: int) -> int:
        """Return how many experts the layer has more than now; below zero for fewer."""
        return len(self._after(layer)) - len(self._before(layer))

    def _before(self, layer: int) -> tuple[int, ...]:
        return self.running.experts_of(layer, self.rank if self.running_rank is None else self.running_rank)

    def _after(self, layer: int) -> tuple[int, ...]:
        return self.wanted.experts_of(layer, self.rank)


def change_bytes(change: ExpertChange, loader: WeightLoader) -> int:
    """Return the bytes that preparing takes above what is held already, reading included."""
    if not change.layers:
        return 0
    one_expert = new_experts(loader.args, 1, loader.kernels, loader.dtype)
    return change.num_slots * one_expert.nbytes + loader.reading_bytes(change.layers)


def prepare_experts(change: ExpertChange, model: MemberModel, loader: WeightLoader,
                    check: Callable[[], None]) -> dict[int, ExpertWeights]:
    """Return weights of the changed layers: experts that stay are copied from `model`, others read. Raises TensorError.

    Runs beside the steps: reads what they read and changes nothing of it. `check` is called after every copy and every
    tensor that was read; what it raises ends the preparation.
    """
    weights_of_layer: dict[int, ExpertWeights] = {}
    kernels = loader.kernels.on_one_thread()        # the steps have the others
    for layer in change.layers:
        weights = new_experts(loader.args, change.num_experts(layer), kernels, loader.dtype)
        for slot, running_slot in change.kept_slots(layer).items():
            weights.copy_slot(slot, model.experts[layer].weights, running_slot)
            check()
        weights_of_layer[layer] = weights
    loader.load_experts([LayerFill(layer, weights, change.read_slots(layer))
                         for layer, weights in weights_of_layer.items()], lambda done, total: check())
    return weights_of_layer


def exchange_experts(change: ExpertChange, model: MemberModel, loader: WeightLoader, has_room: Callable[[int], bool],
                     progress: Progress) -> int:
    """Give an idle member its wanted experts, and return the bytes read. Experts that stay are copied within memory.

    Layers that shrink come first, so that no more is held than before or after, plus one layer. Where `has_room(bytes)`
    says that even this does not fit, a layer's experts are given up first and all read. Raises TensorError,
    CheckpointError: then `model` is not to be used.
    """
    expert_bytes = new_experts(loader.args, 1, loader.kernels, loader.dtype).nbytes
    fills: list[LayerFill] = []
    unread_bytes = 0        # allocated, and not in use before they are read
    for layer in sorted(change.layers, key=change.num_more_experts):
        fits = has_room(unread_bytes + change.num_experts(layer) * expert_bytes)
        fill = _moved(change, layer, model, loader) if fits else _emptied(change, layer, model, loader)
        unread_bytes += len(fill.slots) * expert_bytes
        fills.append(fill)
    return loader.load_experts(fills, progress)


def _moved(change: ExpertChange, layer: int, model: MemberModel, loader: WeightLoader) -> LayerFill:
    weights = new_experts(loader.args, change.num_experts(layer), loader.kernels, loader.dtype)
    for slot, running_slot in change.kept_slots(layer).items():
        weights.copy_slot(slot, model.experts[layer].weights, running_slot)
    model.experts[layer].weights = weights
    return LayerFill(layer, weights, change.read_slots(layer))


def _emptied(change: ExpertChange, layer: int, model: MemberModel, loader: WeightLoader) -> LayerFill:
    model.experts[layer].weights = new_experts(loader.args, 0, loader.kernels, loader.dtype)    # frees what was there
    weights = new_experts(loader.args, change.num_experts(layer), loader.kernels, loader.dtype)
    model.experts[layer].weights = weights
    return LayerFill(layer, weights, change.slots(layer))
