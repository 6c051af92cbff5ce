"""Prepares another placement for a member that goes on serving: new weights, put in between two steps.

Only layers whose experts change on this member are touched. Until the swap they exist twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.expert_host import MemberModel
from model.kernels.protocol import ExpertWeights
from model.moe import new_experts
from model.placement import Placement
from model.weights import LayerFill, WeightLoader


@dataclass(frozen=True, slots=True)
class ExpertChange:
    """Says what one member's experts are and shall be."""

    running: Placement
    wanted: Placement
    rank: int

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

    def num_experts(self, layer: int) -> int:
        return len(self._after(layer))

    def _before(self, layer: int) -> tuple[int, ...]:
        return self.running.experts_of(layer, self.rank)

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
    for layer in change.layers:
        weights = new_experts(loader.args, change.num_experts(layer), loader.kernels, loader.dtype)
        for slot, running_slot in change.kept_slots(layer).items():
            weights.copy_slot(slot, model.experts[layer].weights, running_slot)
            check()
        weights_of_layer[layer] = weights
    loader.load_experts([LayerFill(layer, weights, change.read_slots(layer))
                         for layer, weights in weights_of_layer.items()], lambda done, total: check())
    return weights_of_layer
