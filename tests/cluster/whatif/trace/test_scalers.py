"""The autoscaler in a simulation: bursts are served in time with less than a fixed size takes, and Ray's is timed."""

from __future__ import annotations

import warnings

from cluster.autoscaler.fleet import Work
from cluster.whatif.trace.scalers import FixedSize, OurScaler
from cluster.whatif.trace.simulation import Simulation
from tests.cluster.whatif.trace.simulated import burst, model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # Ray's own, at import
    from ray.serve.config import AutoscalingConfig

    from cluster.whatif.trace.stock_scaler import StockScaler, first_replicas


def test_bursts_are_served_in_time_with_fewer_replica_seconds_than_a_fixed_size_takes() -> None:
    trace, fleet = [*burst(20, 0.0), *burst(20, 300.0), *burst(20, 600.0)], model()
    ours = OurScaler(fleet)
    run = Simulation(trace, fleet, ours, (2,)).run()
    fixed = next(ran for num in range(2, 7) if (ran := Simulation(trace, fleet, FixedSize((num,)), (num,)).run())
                 .attained(4.0, 0.1) >= 0.99)
    assert run.attained(4.0, 0.1) >= 0.99 and run.replica_seconds < 0.9 * fixed.replica_seconds
    assert [decision.changes[0].after > decision.changes[0].before for _, decision in ours.decisions[:2]] == [True,
                                                                                                           False]


def test_the_stock_policy_waits_before_it_follows_the_ongoing_requests() -> None:
    config = AutoscalingConfig(min_replicas=1, max_replicas=6, target_ongoing_requests=2)
    stock = StockScaler(model(), config, 30.0)
    busy = Work(num_held=8)
    counts = [stock.wanted(float(second), (2,), (2,), busy) for second in range(40)]
    assert counts[29] == (2,) and counts[30] == (4,)
    down = [stock.wanted(100.0 + second, (4,), (4,), Work()) for second in range(700)]
    assert down[599] == (4,) and (2,) in down           # what holds the model


def test_the_first_replicas_are_those_of_the_first_pools() -> None:
    assert first_replicas(model(most=3), 2) == (2,) and first_replicas(model(most=3), 9) == (3,)
