"""The cost of each part of a step to each member, from profiles and a workload. Pure.

M members, E experts of a layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cluster.planner.costs.alike_layers import for_each_layer
from cluster.planner.costs.device_curves import curve_seconds
from cluster.planner.costs.expert_times import ExpertTimes, chosen_probability, expert_times
from cluster.planner.costs.profile_check import profile_fault
from cluster.planner.layer.error import PlacementError
from model.args import ModelArgs
from model.arrays import FloatArray
from serving.link.epoch import DeviceProfile

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workload:
    """The step that a plan is made for."""

    num_rows: int                   # of a step, all members together
    context_tokens: int             # that a row attends to
    expert_load: tuple[tuple[float, ...], ...] = ()     # per MoE layer and expert, relative; empty or all 0: uniform

    def load_of(self, layer: int) -> tuple[float, ...]:
        """Return the loads of one MoE layer's experts; empty: uniform."""
        return self.expert_load[layer] if self.expert_load else ()


class StepCosts:
    """The costs of one workload on some members, computed once. Raises PlacementError for what is wrong with them."""

    def __init__(self, args: ModelArgs, dtype_bytes: int, profiles: Sequence[DeviceProfile], workload: Workload,
                 names: Sequence[str] = ()) -> None:
        for rank, profile in enumerate(profiles):
            fault = profile_fault(profile)
            if fault:
                raise PlacementError(f"member {names[rank] if names else rank}: {fault}",
                                     fix="measure this member again, or leave it out")
        check_workload(args, workload)
        self.args = args
        self.dtype_bytes = dtype_bytes
        self.profiles = tuple(profiles)
        self.workload = workload
        self.row_bytes = args.hidden_size * dtype_bytes
        self._times: list[ExpertTimes] = [expert_times(profile.expert_s, workload.num_rows) for profile in profiles]

    def probability(self, layer: int) -> FloatArray:
        """Return the chance that a row chooses each expert of a MoE layer."""
        load_E = self.workload.load_of(layer) or (1.0,) * self.args.num_experts
        return chosen_probability(load_E, self.args.num_experts_per_tok)

    def probabilities(self) -> list[FloatArray]:
        """Return the same of every MoE layer."""
        return self.of_each_load(self.probability)

    def of_each_load(self, compute: Callable[[int], T]) -> list[T]:
        """Return compute(layer) of every MoE layer; of layers with equal loads only the first is computed."""
        return for_each_layer(map(self.workload.load_of, range(self.args.num_moe_layers)), compute)

    def expert_costs(self, probability_E: FloatArray) -> FloatArray:
        """Return the seconds that each member takes for all rows of each expert in a step: costs_EM."""
        return np.stack([times.expected(probability_E) for times in self._times], axis=1)

    def own_experts_s(self, rank: int, rows: float, probability_E: FloatArray) -> float:
        """Return what one layer's experts take for so many rows, all of them computed by this member alone."""
        return float(self._times[rank].expected(probability_E * (rows / self.workload.num_rows)).sum())

    def all_own_experts_s(self, rank: int, rows: float) -> float:
        """Return the same of all layers' experts."""
        return math.fsum(self.of_each_load(lambda layer: self.own_experts_s(rank, rows, self.probability(layer))))

    def attention_s(self, rank: int, rows: float) -> float:
        """Return what one layer takes the rows' owner, without overhead. Fewer rows than one take as long as one."""
        profile = self.profiles[rank]
        if rows <= 0:
            return 0.0
        return curve_seconds(profile.dense_s, max(1.0, rows)) + self.attended_s(rank, rows)

    def attended_s(self, rank: int, rows: float) -> float:
        """Return the part of it that reads the KV cache."""
        if rows <= 0:
            return 0.0
        share = len(self.args.attention_layers) / self.args.num_layers      # the other layers have no KV cache
        return share * self.profiles[rank].attention_s * max(1.0, rows) * self.workload.context_tokens

    def dense_mlp_s(self, rank: int, rows: float) -> float:
        """Return what a dense layer's MLP takes. Not measured: as one expert, scaled by the intermediate size."""
        if rows <= 0 or self.args.num_moe_layers == self.args.num_layers:
            return 0.0
        scale = self.args.intermediate_size / self.args.moe_intermediate_size
        return scale * curve_seconds(self.profiles[rank].expert_s, max(1.0, rows))

    def head_s(self, rank: int, rows: float) -> float:
        return curve_seconds(self.profiles[rank].head_s, max(1.0, rows)) if rows > 0 else 0.0

    def own_rows_s(self, rank: int, rows: float) -> float:
        """Return what a member takes for all of its own rows in a step, overhead included; 0 without rows."""
        args = self.args
        if rows <= 0:
            return 0.0
        layers_s = args.num_layers * (self.attention_s(rank, rows) + self.profiles[rank].layer_overhead_s)
        dense_s = (args.num_layers - args.num_moe_layers) * self.dense_mlp_s(rank, rows)
        return layers_s + dense_s + self.head_s(rank, rows)


def check_workload(args: ModelArgs, workload: Workload) -> None:
    if not args.moe_layers:
        raise PlacementError("the model has no layers with experts", fix="give a Mixture-of-Experts model")
    if workload.num_rows < 1 or workload.context_tokens < 0:
        raise PlacementError(f"num_rows={workload.num_rows}, context_tokens={workload.context_tokens}",
                             fix="plan for one row or more, and a context of 0 tokens or more")
    load, shape = workload.expert_load, (args.num_moe_layers, args.num_experts)
    if load and (len(load) != shape[0] or any(len(one) != shape[1] for one in load)):
        raise PlacementError(f"expert loads are {len(load)} layers x {sorted({len(one) for one in load})} experts, the "
                             f"model has {shape[0]} MoE layers x {shape[1]} experts",
                             fix="count the loads of this model, or give none")
    for layer, load_E in enumerate(load):
        for expert, value in enumerate(load_E):
            if not 0 <= value < math.inf:
                raise PlacementError(f"layer {layer}: expert {expert} has load {value}",
                                     fix="loads are finite and not below zero")
