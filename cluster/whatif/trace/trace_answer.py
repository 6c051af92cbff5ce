"""The answer of `moesaic plan --trace`: the autoscaler on a trace, beside fixed sizes and Ray Serve's own policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray.serve.config import AutoscalingConfig as StockConfig

from cluster.autoscaler.capability import ScalingRules
from cluster.autoscaler.fleet import Counts
from cluster.autoscaler.policy import Decision
from cluster.autoscaler.speed import replica_speed
from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_demand import DTYPE_BYTES
from cluster.whatif.cluster_file import figures_of, planned_members
from cluster.whatif.question import PlanQuestion
from cluster.whatif.trace.fleet_model import FleetModel, SimulatedPool
from cluster.whatif.trace.scalers import FixedSize, OurScaler, Scaler
from cluster.whatif.trace.simulation import DECIDE_S, Run, Simulation
from cluster.whatif.trace.stock_scaler import StockScaler, first_replicas
from cluster.whatif.trace.trace_file import TracedRequest
from serving.cluster_config import NodesConfig
from serving.config import AutoscalingConfig

ATTAINMENT = 0.99           # that a fixed size is sought for
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class NamedRun:
    name: str
    run: Run
    attained: float             # part of the requests within both SLOs


@dataclass(frozen=True, slots=True)
class TraceAnswer:
    question: PlanQuestion
    trace: tuple[TracedRequest, ...]
    model: FleetModel
    ours: NamedRun
    decisions: tuple[tuple[float, Decision], ...]
    stock: tuple[NamedRun, ...]         # Ray Serve's, with its defaults and with the delays of ours
    fixed: tuple[NamedRun, ...]         # the sizes that were tried, the smallest first
    smallest: NamedRun | None           # of them that attains ATTAINMENT; None: not even all replicas do

    @property
    def part_of_fixed(self) -> float | None:
        """Return our replica-seconds over those of the smallest fixed size that attains ATTAINMENT."""
        return self.ours.run.replica_seconds / self.smallest.run.replica_seconds if self.smallest else None


def answer_trace(question: PlanQuestion, trace: tuple[TracedRequest, ...], say: Say) -> TraceAnswer:
    """Simulate. Raises PlacementError where not even all devices hold the model."""
    model = fleet_model(question)
    all_held = sum(model.most())
    least = next((num for num in range(1, all_held + 1) if model.holds(first_replicas(model, num))), None)
    if least is None:
        raise PlacementError("all devices of the cluster together do not hold the model",
                             fix="ask `moesaic plan` without --trace what would make it fit")
    start = first_replicas(model, least)
    say("the autoscaler")
    scaler = OurScaler(model)
    ours = _run("autoscaler", trace, model, scaler, (0,) * len(start) if model.rules.idle_timeout_s else start)
    say("Ray Serve's policy")
    stock = tuple(_run(name, trace, model, scaler, start) for name, scaler in _stock_scalers(model).items())
    fixed = _fixed_sizes(trace, model, least, say)
    smallest = next((one for one in fixed if one.attained >= ATTAINMENT), None)
    return TraceAnswer(question, trace, model, ours, tuple(scaler.decisions), stock, fixed, smallest)


def fleet_model(question: PlanQuestion) -> FleetModel:
    goals = question.config.autoscaling or AutoscalingConfig()
    rules = ScalingRules(
        goals.ttft_slo_s, goals.itl_slo_s, goals.keep_alive_s, goals.idle_timeout_s,
        question.demand(question.cluster), question.options.min_copies,
        question.sequence_bytes / question.workload.context_tokens, question.options.policy)
    scheduler = question.config.scheduler
    return FleetModel(tuple(_pool(question, nodes) for nodes in question.cluster.nodes), rules,
                      scheduler.max_batch_tokens, scheduler.max_running_requests)


def _pool(question: PlanQuestion, nodes: NodesConfig) -> SimulatedPool:
    """Describe the devices of one kind; each is a replica."""
    member = next(one for one in planned_members(question.cluster, question.args, question.dtype, question.measured)
                  if one.pool == nodes.name)
    speed = replica_speed(question.args, DTYPE_BYTES[question.dtype], member.profile, question.workload.context_tokens,
                          question.config.scheduler.max_batch_tokens)
    assumed, loaded = question.cluster.assumed, min(member.memory.budget_bytes, question.stored_bytes)
    ready_s = nodes.ready_s if nodes.ready_s is not None else assumed.start_s + loaded / assumed.load_bandwidth
    return SimulatedPool(nodes.name, nodes.count * nodes.devices, speed, member.memory, ready_s, nodes.cost_per_hour)


def _stock_scalers(model: FleetModel) -> dict[str, StockScaler]:
    most, keep_alive_s = sum(model.most()), model.rules.keep_alive_s
    quick = StockConfig(min_replicas=1, max_replicas=most, upscale_delay_s=0, downscale_delay_s=keep_alive_s)
    stock = StockConfig(min_replicas=1, max_replicas=most)
    return {"Ray Serve": StockScaler(model, stock, stock.look_back_period_s),
            "Ray Serve, quick": StockScaler(model, quick, 4 * DECIDE_S)}


def _fixed_sizes(trace: Sequence[TracedRequest], model: FleetModel, least: int, say: Say) -> tuple[NamedRun, ...]:
    """Halve the sizes down to the smallest that attains ATTAINMENT: more replicas never attain less."""
    def tried(num: int) -> NamedRun:
        say(f"{num} replicas all the time")
        counts = first_replicas(model, num)
        return _run(f"fixed {num}", trace, model, FixedSize(counts), counts)
    low, high = least, sum(model.most())
    found = {num: tried(num) for num in {low, high}}
    if found[low].attained >= ATTAINMENT or found[high].attained < ATTAINMENT:
        return tuple(found[num] for num in sorted(found))
    while high - low > 1:
        middle = (low + high) // 2
        found[middle] = tried(middle)
        low, high = (low, middle) if found[middle].attained >= ATTAINMENT else (middle, high)
    return tuple(found[num] for num in sorted(found))


def _run(name: str, trace: Sequence[TracedRequest], model: FleetModel, scaler: Scaler, start: Counts) -> NamedRun:
    run = Simulation(trace, model, scaler, start).run()
    return NamedRun(name, run, run.attained(model.rules.ttft_slo_s, model.rules.itl_slo_s))


def sources(question: PlanQuestion) -> tuple[str, ...]:
    """Say of each kind of device where its figures are from."""
    return tuple(f"{nodes.name}: " + ("measured" if nodes.name in question.measured else figures_of(nodes).source)
                 for nodes in question.cluster.nodes)
