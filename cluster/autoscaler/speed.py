"""How fast one replica of a pool is by its profile, were it to hold the whole model alone. Pure.

A group makes about the sum of what its members make alone (capability.GROUP_EFFICIENCY). It loads SciPy.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.costs.device_curves import curve_seconds
from cluster.planner.costs.step_costs import StepCosts, Workload
from model.args import ModelArgs
from model.curve import Curve
from serving.link.epoch import DeviceProfile

_FACTOR = 2         # from one number of rows to the next


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    step_s: Curve                   # (rows, seconds) from one row to what a step may compute

    @property
    def max_batch_tokens(self) -> int:
        return self.step_s[-1][0]

    @property
    def prefill_tokens_per_s(self) -> float:
        rows, seconds = self.step_s[-1]
        return rows / seconds

    def rows_within(self, seconds: float) -> float:
        """Return the rows of a step that takes so long: less than one where one row takes longer."""
        before = (0, 0.0)
        for point in self.step_s:
            if point[1] > seconds:
                break
            before = point
        else:
            return float(self.max_batch_tokens)
        part = (seconds - before[1]) / (point[1] - before[1])
        return before[0] + part * (point[0] - before[0])

    def seconds(self, rows: float) -> float:
        return curve_seconds(self.step_s, rows)


def replica_speed(args: ModelArgs, dtype_bytes: int, profile: DeviceProfile, context_tokens: int,
                  max_batch_tokens: int) -> ReplicaSpeed:
    """Work out the step of one device at several numbers of rows. Raises PlacementError."""
    numbers = [1]
    while numbers[-1] * _FACTOR < max_batch_tokens:
        numbers.append(numbers[-1] * _FACTOR)
    curve = []
    for num_rows in sorted({*numbers, max_batch_tokens}):
        costs = StepCosts(args, dtype_bytes, [profile], Workload(num_rows, context_tokens))
        curve.append((num_rows, costs.own_rows_s(0, num_rows) + costs.all_own_experts_s(0, num_rows)))
    return ReplicaSpeed(tuple(curve))
