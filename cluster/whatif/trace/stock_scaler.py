"""Ray Serve's own policy in a simulation: its formula and its delays, by its own functions, on simulated time."""

from __future__ import annotations

import math
from collections import deque

from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors
from ray.serve.config import AutoscalingConfig

from cluster.autoscaler.fleet import Counts, Work
from cluster.whatif.trace.fleet_model import FleetModel


class StockScaler:
    """Target ongoing requests: the mean of what is held within look_back_s, over the target of a replica.

    All pools grow by the order in which they are named, as one deployment would. Never below what holds the model: Ray
    Serve knows nothing of that, so this is in its favour.
    """

    def __init__(self, model: FleetModel, config: AutoscalingConfig, look_back_s: float) -> None:
        self._model = model
        self._config = config
        self._look_back_s = look_back_s
        self._state: dict[str, object] = {}
        self._held: deque[tuple[float, int]] = deque()
        self._least = next(num for num in range(1, sum(model.most()) + 1) if model.holds(first_replicas(model, num)))

    def wanted(self, now_s: float, wanted: Counts, ready: Counts, work: Work) -> Counts:
        config, num_ready = self._config, sum(ready)
        self._held.append((now_s, work.num_held))
        while self._held[0][0] < now_s - self._look_back_s:
            self._held.popleft()
        ongoing = sum(held for _, held in self._held) / len(self._held)
        if num_ready == 0:
            return first_replicas(self._model, max(sum(wanted), self._least))
        desired = _apply_scaling_factors(num_ready * ongoing / (config.get_target_ongoing_requests() * num_ready),
                                         num_ready, config)
        desired = min(max(math.ceil(desired), self._least), sum(self._model.most()))
        num, self._state = _apply_delay_logic(desired, sum(wanted), config, self._state, now_s)
        return first_replicas(self._model, num)


def first_replicas(model: FleetModel, num: int) -> Counts:
    """Return so many replicas, those of the first pools."""
    counts = []
    for most in model.most():
        counts.append(min(num, most))
        num -= counts[-1]
    return tuple(counts)
