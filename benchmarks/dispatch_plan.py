"""Time of planning one MoE layer's dispatch, in one process, in numpy and in C: nothing is sent or computed.

`python benchmarks/dispatch_plan.py [--rows 8,64,2048] [--experts 64] [--copied 0,32,64] [--speeds 4,2,1,1]`.
A row of the table is one (copied experts, rows of each member): microseconds of the split of the rows over the copies
alone, in numpy and Python, and of all that a member plans in a layer, in numpy and in C (first quartile), both also
with cold caches, as after a layer's experts (median); and how much sooner the slowest member is done than if the first
holder computed all rows of an expert.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.dispatch import numbers, placement_with_copies  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from model.arrays import IdArray  # noqa: E402
from model.dispatch import row_plan as plan  # noqa: E402
from model.dispatch.compiled_row_planner import CompiledRowPlanner  # noqa: E402
from model.dispatch.row_planner import NumpyRowPlanner, RowPlanner  # noqa: E402
from model.dispatch.row_split import layer_copies, split_rows  # noqa: E402
from model.kernels.packed_cpu_library import KernelLibrary  # noqa: E402
from model.placement import ExpertRate, Placement  # noqa: E402

ROWS_WHILE_READING = 12.0
COLD_BYTES = 256 << 20
COLD_REPEATS = 21


def expert_ids(num_rows: int, num_experts: int, num_per_token: int) -> IdArray:
    scores = np.random.default_rng(0).random((num_rows, num_experts))
    return np.sort(scores.argsort(axis=1)[:, :num_per_token], axis=1).astype(np.int16)


def first_quartile_us(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return round(statistics.quantiles(seconds, n=4)[0] * 1e6, 1)


def cold_us(function: Callable[[], object]) -> float:
    """Return the median time, each taken after all caches were filled with something else."""
    other = np.zeros(COLD_BYTES // 8)
    seconds = []
    for _ in range(COLD_REPEATS):
        other += 1.0
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds) * 1e6, 1)


def finish_seconds(num_rows: np.ndarray, placement: Placement) -> float:
    return max(sum(rate.seconds(rows) for rows in num_rows[:, rank].tolist())
               for rank, rate in enumerate(placement.rates))


def measure(placement: Placement, num_rows: int, num_per_token: int) -> dict[str, float]:
    num_members, num_experts = placement.num_members, len(placement.holders[0])
    ids = expert_ids(num_rows * num_members, num_experts, num_per_token)
    owners = np.repeat(np.arange(num_members), num_rows)
    routing = plan.layer_routing(placement, 0, 0)
    copies = layer_copies(placement.holders[0], num_members, placement.rates)
    counts = np.bincount(ids.ravel(), minlength=num_experts)

    repeats = 300 if num_rows <= 64 else 40
    first_holders = np.zeros((num_experts, num_members), dtype=np.int64)
    first_holders[np.arange(num_experts), [ranks[0] for ranks in placement.holders[0]]] = counts
    gain = finish_seconds(first_holders, placement) / finish_seconds(split_rows(copies, counts), placement)
    found = {"split_us": first_quartile_us(lambda: split_rows(copies, counts), repeats)}
    planners: dict[str, RowPlanner] = {"numpy": NumpyRowPlanner(routing),
                                       "c": CompiledRowPlanner(routing, KernelLibrary())}
    for name, planner in planners.items():
        call = partial(planner.plan, ids, owners, slice(0, num_rows))
        found |= {f"{name}_us": first_quartile_us(call, repeats), f"{name}_cold_us": cold_us(call)}
    return {**found, "gain": round(gain, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", type=numbers, default=[4, 2, 1, 1], help="of the members")
    parser.add_argument("--rows", type=numbers, default=[8, 64, 2048], help="of each member")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--experts-per-token", type=int, default=8)
    parser.add_argument("--copied", type=numbers, default=[0, 32, 64], help="experts that have a second copy")
    options = parser.parse_args()
    rates = tuple(ExpertRate(ROWS_WHILE_READING / speed, 1.0 / speed) for speed in options.speeds)
    print(f"| copied experts | rows | split us | numpy us | cold | C us | cold | gain |\n{'|---' * 8}|")
    results = []
    for copied in options.copied:
        placement = placement_with_copies(len(options.speeds), options.experts, copied, rates)
        for num_rows in options.rows:
            result = measure(placement, num_rows, options.experts_per_token)
            results.append({"copied": copied, "rows_of_member": num_rows, **result})
            print(f"| {copied} | {len(options.speeds)} x {num_rows} | "
                  + " | ".join(f"{value:g}" for value in result.values()) + " |", flush=True)
    print(json.dumps({"benchmark": "dispatch_plan", "speeds": options.speeds, "experts": options.experts,
                      "experts_per_token": options.experts_per_token, **describe(), "results": results}))


if __name__ == "__main__":
    main()
