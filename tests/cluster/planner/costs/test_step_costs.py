"""The parts of a step have their costs, and some workloads are refused."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.layer.error import PlacementError
from tests.cluster.planner.planned_members import model_args, profile, step_costs


def test_experts_cost_in_proportion_to_speed() -> None:
    costs = step_costs(1.0, 4.0)
    costs_EM = costs.expert_costs(costs.probability(0))
    assert costs_EM.shape == (16, 2)
    assert costs_EM[:, 0] == pytest.approx(4 * costs_EM[:, 1])


def test_own_rows_are_all_layers_and_the_head() -> None:
    costs = step_costs(1.0, num_rows=64)
    layer_s = 64 * 4e-6 + 64 * 100 * 1e-9 + 1e-6
    assert costs.own_rows_s(0, 64) == pytest.approx(3 * layer_s + 64 * 3e-6)
    assert costs.own_rows_s(0, 0) == 0.0


def test_less_than_a_row_takes_as_long_as_one() -> None:
    costs = step_costs(1.0)
    assert costs.head_s(0, 0.1) == costs.head_s(0, 1) == pytest.approx(60e-6)


def test_a_dense_layer_is_an_expert_scaled_by_size() -> None:
    costs = step_costs(1.0, args=model_args(dense=(0,)))
    assert costs.dense_mlp_s(0, 64) == pytest.approx(2 * 64 * 5e-6)
    assert step_costs(1.0).dense_mlp_s(0, 64) == 0.0


def test_loads_make_experts_hot() -> None:
    load = ((1.0,) * 15 + (17.0,),) * 3
    costs = StepCosts(model_args(), 2, [profile()], Workload(1000, 0, load))
    assert costs.probability(0) == pytest.approx(np.array([2 / 32] * 15 + [1.0]), rel=0.1)


@pytest.mark.parametrize(("workload", "says"), [
    (Workload(0, 1), "num_rows=0"),
    (Workload(1, -1), "context_tokens=-1"),
    (Workload(1, 1, ((1.0,) * 16,) * 2), r"loads are 2 layers x \[16\] experts, the model has 3 MoE layers x 16"),
    (Workload(1, 1, ((1.0,) * 15,) * 3), r"3 layers x \[15\] experts"),
    (Workload(1, 1, ((1.0,) * 15 + (float("nan"),),) * 3), "layer 0: expert 15 has load nan"),
    (Workload(1, 1, ((1.0,) * 15 + (-1.0,),) * 3), "layer 0: expert 15 has load -1.0"),
])
def test_a_wrong_workload_says_what_is_wrong(workload: Workload, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        StepCosts(model_args(), 2, [profile()], workload)
