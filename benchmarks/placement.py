"""Measures how close to the best the placement of a layer is, and how little a replan moves.

`python benchmarks/placement.py [--instances 200] [--tight]`. Ratios are step time over the bound (linear program with
copies in fractions); `proven` is over what HiGHS proved for whole copies where it had to. The second table: one member
leaves, the quick planner restores the layer; seconds are the fastest of three runs (what else runs on the machine only
adds), moves are copies loaded over the least possible. Members without which the others have no room stay, and so do
those without which no copy is missing: nothing is to be restored then.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.placement_rules import (  # noqa: E402
    contiguous_s,
    even_s,
    instance,
    least_moves,
    speed_lpt_s,
    without_member,
)
from cluster.planner.layer.error import PlacementError  # noqa: E402
from cluster.planner.layer.exact import solve_exact  # noqa: E402
from cluster.planner.layer.greedy import solve_greedy  # noqa: E402
from cluster.planner.layer.linear_program import lower_bound  # noqa: E402
from cluster.planner.layer.problem import LayerProblem, LayerSolution  # noqa: E402

OTHERS: dict[str, Callable[[LayerProblem], float]] = {
    "contiguous": contiguous_s, "even": even_s, "speed-LPT": speed_lpt_s}
GOOD = 1.01
NUM_RUNS = 3


@dataclass
class Method:
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, ratio: float, seconds: float) -> None:
        self.ratios.append(ratio)
        self.seconds.append(seconds)

    def summary(self) -> dict[str, float]:
        ratios = np.array(self.ratios)
        return {"median": float(np.median(ratios)), "p99": float(np.quantile(ratios, 0.99)), "max": float(ratios.max()),
                "share_good": float((ratios <= GOOD).mean()), "max_s": max(self.seconds)}


@dataclass
class Replan:
    seed: int
    num_experts: int
    num_members: int        # that are left
    seconds: float
    moved: int
    least: int
    ratio: float            # of the step time to the bound with everything free to move


@dataclass
class Certificate:
    methods: dict[str, Method] = field(default_factory=dict)
    replans: list[Replan] = field(default_factory=list)
    num_without_room: int = 0       # layers in which no member can leave

    def add(self, name: str, ratio: float, seconds: float) -> None:
        self.methods.setdefault(name, Method()).add(ratio, seconds)


def timed(solve: Callable[[LayerProblem], LayerSolution], problem: LayerProblem) -> tuple[LayerSolution, float]:
    start = time.perf_counter()
    solution = solve(problem)
    return solution, time.perf_counter() - start


def certify(num_instances: int, is_tight: bool = False, time_limit_s: float = 3.0) -> Certificate:
    """Compare all methods on the first instances; time_limit_s: of the exact solver for each."""
    certificate = Certificate()
    solve_exact(instance(0))                # imports and first calls of the solver are not timed
    for seed in range(num_instances):
        problem = instance(seed, is_tight)
        bound_s = lower_bound(problem)
        for name, rule in OTHERS.items():
            start = time.perf_counter()
            certificate.add(name, rule(problem) / bound_s, time.perf_counter() - start)
        greedy, seconds = timed(solve_greedy, problem)
        certificate.add("ours, greedy", greedy.step_s / bound_s, seconds)
        exact, seconds = timed(functools.partial(solve_exact, time_limit_s=time_limit_s), problem)
        certificate.add("ours, exact", exact.step_s / bound_s, seconds)
        certificate.add("ours, exact, proven", exact.step_s / exact.bound_s, seconds)
        replan = leave(seed, problem, exact)
        if replan is None:
            certificate.num_without_room += 1
        else:
            certificate.replans.append(replan)
    return certificate


def leave(seed: int, problem: LayerProblem, solution: LayerSolution) -> Replan | None:
    """Let a member leave: chance says which, among those that are missed and whose slots the others can spare."""
    for gone in np.random.default_rng(seed).permutation(len(problem.slots_M)).tolist():
        try:
            left = without_member(problem, solution.holders, gone)
        except PlacementError:
            continue
        if not left.num_lost():
            continue
        runs = [timed(solve_greedy, left) for _ in range(NUM_RUNS)]
        after = runs[0][0]
        return Replan(seed, len(left.costs_EM), len(left.slots_M), min(seconds for _, seconds in runs),
                      after.num_moved, least_moves(left), after.step_s / after.bound_s)
    return None


def print_tables(certificate: Certificate) -> None:
    print(f"| method | median | p99 | max | within {GOOD} | longest, s |")
    print("|---" * 6 + "|")
    for name, method in certificate.methods.items():
        row = method.summary()
        print(f"| {name} | {row['median']:.4f} | {row['p99']:.4f} | {row['max']:.4f} | {row['share_good']:.1%} | "
              f"{row['max_s']:.3f} |")
    print("\n| replans | longest, ms | median, ms | moved / least, max | within 1.1 | step / bound, median |")
    print("|---" * 6 + "|")
    row = replan_summary(certificate)
    print(f"| {row['replans']} | {row['max_s'] * 1e3:.1f} | {row['median_s'] * 1e3:.1f} | {row['max_moved']:.3f} | "
          f"{row['share_within']:.1%} | {row['median_ratio']:.3f} |")
    print(f"\nlayers in which no member can leave: {certificate.num_without_room}")


def replan_summary(certificate: Certificate) -> dict[str, float]:
    replans = certificate.replans
    moved = np.array([replan.moved / replan.least for replan in replans])
    seconds = np.array([replan.seconds for replan in replans])
    return {"replans": len(replans), "max_s": float(seconds.max()), "median_s": float(np.median(seconds)),
            "max_moved": float(moved.max()), "share_within": float((moved <= 1.1).mean()),
            "median_ratio": float(np.median([replan.ratio for replan in replans]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--tight", action="store_true", help="no slot more than the spare ones, all members together")
    options = parser.parse_args()
    certificate = certify(options.instances, options.tight)
    print_tables(certificate)
    print(json.dumps({"benchmark": "placement", "instances": options.instances, "tight": options.tight, **describe(),
                      "methods": {name: method.summary() for name, method in certificate.methods.items()},
                      "replan": replan_summary(certificate), "num_without_room": certificate.num_without_room,
                      "replans": [asdict(replan) for replan in certificate.replans]}))


if __name__ == "__main__":
    main()
