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
    rows_M = np.array([share.fraction for share in shares], dtype=np.float64) * costs.workload.num_rows
    layers = _expert_layers(costs, holders, splits, rows_M)
    own = _own_times(costs, rows_M, (rows_M > 0) | np.any([layer.holds_M for layer in layers], axis=0))
    parts = _parts(costs, layers, own)
    step_s = sum(parts.values())
    return StepPrediction(step_s, costs.workload.num_rows / step_s, _member_times(costs, layers, own),
                          max(parts, key=lambda part: parts[part]))


@dataclass(frozen=True, slots=True)
class _OwnTimes:
    """Seconds that each member takes for its own rows."""

    rows_M: FloatArray
    attention_M: FloatArray         # of one layer
    mlp_M: FloatArray               # of one dense layer
    head_M: FloatArray
    overhead_M: FloatArray          # of one layer, of those that take part


def _own_times(costs: StepCosts, rows_M: FloatArray, takes_part_M: BoolArray) -> _OwnTimes:
    ranks_and_rows = list(enumerate(rows_M))
    return _OwnTimes(rows_M, np.array([costs.attention_s(rank, rows) for rank, rows in ranks_and_rows]),
                     np.array([costs.dense_mlp_s(rank, rows) for rank, rows in ranks_and_rows]),
                     np.array([costs.head_s(rank, rows) for rank, rows in ranks_and_rows]),
                     np.array([profile.layer_overhead_s for profile in costs.profiles]) * takes_part_M)


def _parts(costs: StepCosts, layers: Sequence[_LayerTime], own: _OwnTimes) -> dict[Limit, float]:
    """Divide the step by what it waits for. Every barrier waits for the member that is slowest up to it."""
    parts: dict[Limit, float] = {"memory bandwidth": 0.0, "compute": 0.0, "link": 0.0, "overhead": 0.0}
    alone = _who_decides_alone(costs, layers, own)
    for layer in layers:
        parts[layer.limit] += float(layer.experts_M.max() if alone is None else layer.experts_M[alone])
        parts["link"] += float(layer.exchange_M.max())
    num_moe, num_dense = costs.args.num_moe_layers, costs.args.num_layers - costs.args.num_moe_layers
    slowest = int((own.attention_M + own.overhead_M).argmax()) if alone is None else alone
    _add_own_rows(parts, costs, slowest, float(own.rows_M[slowest]), (num_moe, float(own.overhead_M[slowest]), 0.0))
    slowest = int((own.attention_M + own.overhead_M + own.mlp_M).argmax()) if alone is None else alone
    _add_own_rows(parts, costs, slowest, float(own.rows_M[slowest]),
                  (num_dense, float(own.overhead_M[slowest]), float(own.mlp_M[slowest])))
    slowest = int(own.head_M.argmax()) if alone is None else alone
    parts[_regime(costs.profiles[slowest].head_s, float(own.rows_M[slowest]))] += float(own.head_M[slowest])
    return parts


def _who_decides_alone(costs: StepCosts, layers: Sequence[_LayerTime], own: _OwnTimes) -> int | None:
    """Return the slowest member where nothing is exchanged: without barriers all parts of the step are its own."""
    if not all(layer.stays for layer in layers):
        return None
    args, experts_M = costs.args, np.sum([layer.experts_M for layer in layers], axis=0)
    num_dense = args.num_layers - args.num_moe_layers
    busy_M = args.num_layers * (own.attention_M + own.overhead_M) + num_dense * own.mlp_M + experts_M + own.head_M
    return int(busy_M.argmax())


def _member_times(costs: StepCosts, layers: Sequence[_LayerTime], own: _OwnTimes) -> tuple[MemberTime, ...]:
    num_layers, num_dense = costs.args.num_layers, costs.args.num_layers - costs.args.num_moe_layers
    experts_M = np.sum([layer.experts_M for layer in layers], axis=0)
    exchange_M = np.sum([layer.exchange_M for layer in layers], axis=0)
    return tuple(MemberTime(
        attention_s=float(num_layers * own.attention_M[rank] + num_dense * own.mlp_M[rank]),
        experts_s=float(experts_M[rank]), exchange_s=float(exchange_M[rank]), head_s=float(own.head_M[rank]),
        overhead_s=float(num_layers * own.overhead_M[rank])) for rank in range(len(costs.profiles)))


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
