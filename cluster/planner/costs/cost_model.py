"""The predicted time of a step under a placement, from the members' profiles. Pure.

A step is layer after layer: every member computes attention for its own rows, rows go to their experts, every member
computes its experts, outputs come back; then every member computes its logits. Each of these is a barrier, so each
takes as long as the slowest member. M members, E experts of a layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.planner.costs.alike_layers import for_each_layer
from cluster.planner.costs.device_curves import fit_rate
from cluster.planner.costs.exchange_cost import exchange_seconds
from cluster.planner.costs.step_costs import StepCosts
from cluster.planner.layer.linear_program import best_split
from cluster.planner.layer.problem import Holders, LayerProblem, Split, holders_mask, split_matrix
from model.arrays import BoolArray, FloatArray
from model.curve import Curve
from serving.link.epoch import RequestShare

Limit = Literal["memory bandwidth", "compute", "link", "overhead"]


@dataclass(frozen=True, slots=True)
class MemberTime:
    """Seconds of one member in one step, all layers together."""

    attention_s: float              # norms, projections, attention, gate, dense layers
    experts_s: float
    exchange_s: float
    head_s: float
    overhead_s: float

    @property
    def busy_s(self) -> float:
        return self.attention_s + self.experts_s + self.exchange_s + self.head_s + self.overhead_s


@dataclass(frozen=True, slots=True)
class StepPrediction:
    step_s: float
    tokens_per_s: float             # every row is a decode
    members: tuple[MemberTime, ...]
    limit: Limit                    # what takes the largest part of step_s


def predict_step(costs: StepCosts, holders: Sequence[Holders], splits: Sequence[Split] | None,
                 shares: Sequence[RequestShare]) -> StepPrediction:
    """Predict the step of a placement. `splits` of each layer; None: the best ones.

    A member with neither rows nor experts takes no part.
    """
    args, num_members = costs.args, len(costs.profiles)
    rows_M = np.array([share.fraction for share in shares], dtype=np.float64) * costs.workload.num_rows
    layers = _expert_layers(costs, holders, splits, rows_M)
    is_in_M = (rows_M > 0) | np.any([layer.holds_M for layer in layers], axis=0)
    overhead_M = np.array([profile.layer_overhead_s for profile in costs.profiles]) * is_in_M
    attention_M = np.array([costs.attention_s(rank, rows) for rank, rows in enumerate(rows_M)])
    mlp_M = np.array([costs.dense_mlp_s(rank, rows) for rank, rows in enumerate(rows_M)])
    head_M = np.array([costs.head_s(rank, rows) for rank, rows in enumerate(rows_M)])
    num_dense = args.num_layers - args.num_moe_layers
    experts_M = np.sum([layer.experts_M for layer in layers], axis=0)
    exchange_M = np.sum([layer.exchange_M for layer in layers], axis=0)
    parts: dict[Limit, float] = {"memory bandwidth": 0.0, "compute": 0.0, "link": 0.0, "overhead": 0.0}
    busy_M = args.num_layers * (attention_M + overhead_M) + num_dense * mlp_M + experts_M + head_M
    # Without an exchange there are no barriers within the step: all its parts are those of one member.
    alone = int(busy_M.argmax()) if all(layer.stays for layer in layers) else None
    for layer in layers:
        parts[layer.limit] += float(layer.experts_M.max() if alone is None else layer.experts_M[alone])
        parts["link"] += float(layer.exchange_M.max())
    slowest = int((attention_M + overhead_M).argmax()) if alone is None else alone
    _add_own_rows(parts, costs, slowest, float(rows_M[slowest]), (args.num_moe_layers, float(overhead_M[slowest]), 0.0))
    slowest = int((attention_M + overhead_M + mlp_M).argmax()) if alone is None else alone
    _add_own_rows(parts, costs, slowest, float(rows_M[slowest]),
                  (num_dense, float(overhead_M[slowest]), float(mlp_M[slowest])))
    slowest = int(head_M.argmax()) if alone is None else alone
    parts[_regime(costs.profiles[slowest].head_s, float(rows_M[slowest]))] += float(head_M[slowest])
    members = tuple(MemberTime(
        attention_s=float(args.num_layers * attention_M[rank] + num_dense * mlp_M[rank]),
        experts_s=float(experts_M[rank]), exchange_s=float(exchange_M[rank]), head_s=float(head_M[rank]),
        overhead_s=float(args.num_layers * overhead_M[rank])) for rank in range(num_members))
    step_s = sum(parts.values())
    return StepPrediction(step_s, costs.workload.num_rows / step_s, members, max(parts, key=lambda part: parts[part]))


@dataclass(frozen=True, slots=True)
class _LayerTime:
    experts_M: FloatArray
    exchange_M: FloatArray
    holds_M: BoolArray
    limit: Limit                    # of the slowest member's experts
    stays: bool = False             # nothing is exchanged


def _expert_layers(costs: StepCosts, holders: Sequence[Holders], splits: Sequence[Split] | None, rows_M: FloatArray,
                   ) -> list[_LayerTime]:
    split_of = splits or (None,) * len(holders)
    keys = ((of_layer, split_of[layer], costs.workload.load_of(layer)) for layer, of_layer in enumerate(holders))
    return for_each_layer(keys, lambda layer: _layer_time(
        costs, costs.probability(layer), holders[layer], split_of[layer], rows_M))


def _layer_time(costs: StepCosts, probability_E: FloatArray, holders: Holders, split: Split | None,
                rows_M: FloatArray) -> _LayerTime:
    num_experts, num_members = len(holders), len(costs.profiles)
    costs_EM, held_EM = costs.expert_costs(probability_E), holders_mask(holders, num_members)
    if held_EM[:, rows_M > 0].all():
        return _layer_that_stays(costs, probability_E, held_EM, rows_M)
    if split is None:
        split_EM = best_split(LayerProblem(costs_EM, (num_experts,) * num_members), held_EM)[1]
    else:
        split_EM = split_matrix(holders, split, num_members)
    experts_M = (split_EM * costs_EM).sum(axis=0)
    exchange_M = exchange_seconds(costs.profiles, rows_M, probability_E, split_EM, costs.row_bytes)
    slowest = int(experts_M.argmax())
    limit = _experts_limit(costs, slowest, (split_EM * costs_EM)[:, slowest], costs.workload.num_rows * probability_E)
    return _LayerTime(experts_M, exchange_M, np.asarray(held_EM.any(axis=0)), limit)


def _layer_that_stays(costs: StepCosts, probability_E: FloatArray, held_EM: BoolArray,
                      rows_M: FloatArray) -> _LayerTime:
    """Time a layer in which every member with rows holds every expert: nothing is exchanged."""
    experts_M = np.array([costs.own_experts_s(rank, rows, probability_E) for rank, rows in enumerate(rows_M)])
    slowest = int(experts_M.argmax())
    limit = _experts_limit(costs, slowest, probability_E, rows_M[slowest] * probability_E)
    return _LayerTime(experts_M, np.zeros(len(rows_M)), np.asarray(held_EM.any(axis=0)), limit, stays=True)


def _experts_limit(costs: StepCosts, rank: int, weight_E: FloatArray, rows_E: FloatArray) -> Limit:
    """Return which takes the larger part of `weight_E`: reading the weights, or computing the rows."""
    rate = fit_rate(costs.profiles[rank].expert_s)
    reading = float(weight_E[rate.row_s * rows_E < rate.read_s].sum())
    return "memory bandwidth" if reading * 2 >= float(weight_E.sum()) else "compute"


def _add_own_rows(parts: dict[Limit, float], costs: StepCosts, rank: int, rows: float,
                  layers: tuple[int, float, float]) -> None:
    """Add what the rows' owner takes in `num_layers` alike, with their overhead and dense MLP. In place."""
    num_layers, overhead_s, mlp_s = layers
    profile = costs.profiles[rank]
    attended_s = costs.attended_s(rank, rows)
    parts["overhead"] += num_layers * overhead_s
    parts["memory bandwidth"] += num_layers * attended_s
    parts[_regime(profile.dense_s, rows)] += num_layers * (costs.attention_s(rank, rows) - attended_s)
    parts[_regime(profile.expert_s, rows)] += num_layers * mlp_s


def _regime(curve: Curve, rows: float) -> Limit:
    rate = fit_rate(curve)
    return "compute" if rate.row_s * rows > rate.read_s else "memory bandwidth"
