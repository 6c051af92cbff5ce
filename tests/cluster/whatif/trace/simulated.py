"""A simulated fleet for tests: replicas of 1,000 prompt tokens a second, of which two hold the model."""

from __future__ import annotations

from dataclasses import replace

from cluster.autoscaler.speed import ReplicaSpeed
from cluster.whatif.trace.fleet_model import FleetModel, SimulatedPool
from cluster.whatif.trace.trace_file import TracedRequest
from tests.cluster.autoscaler.fleets import RULES, facts

SPEED = ReplicaSpeed(tuple((rows, 0.02 + rows * 0.001) for rows in (1, 8, 64, 512)))


def model(most: int = 6, ready_s: float = 2.0) -> FleetModel:
    pool = SimulatedPool("a", most, SPEED, facts().memory, ready_s, cost_per_hour=2.0)
    rules = replace(RULES, kv_token_bytes=0.01)
    return FleetModel((pool,), rules, max_batch_tokens=512, max_running=64)


def burst(num: int, at_s: float, prompt: int = 400, output: int = 5) -> list[TracedRequest]:
    """So many requests within a second."""
    return [TracedRequest(at_s + index / num, prompt, output) for index in range(num)]
