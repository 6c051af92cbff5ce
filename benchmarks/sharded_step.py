"""Time of a decode step of several shards on this machine, by what carries their headers and rows.

`python benchmarks/sharded_step.py DIR [--members 2,3] [--rows 1,16] [--steps 60]`. DIR: see make_checkpoint.py. Experts
are spread evenly, all rows are the first member's, every member has one thread, and the first one borrows the others'
for its own rows, as shards of one machine do. Shared memory, TCP and Gloo take turns, ten steps each; a step is the
agreement and the forward, figures are medians on the first member.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.transport import WAYS, end_members, join_all, numbers, start_members  # noqa: E402
from cluster.shard.process_group import ProcessGroup  # noqa: E402
from model.args import read_model_args  # noqa: E402
from model.dispatch.auto import AutoDispatcher  # noqa: E402
from model.dispatch.exchange import RowExchange  # noqa: E402
from model.host_threads import HostThreads  # noqa: E402
from model.kernels.select import select_kernels  # noqa: E402
from model.placement import Placement  # noqa: E402
from model.runner import Runner  # noqa: E402
from model.step import SamplingSpec, ScheduledRequest, StepHeader, StepPlan  # noqa: E402
from model.weights import load_decoder  # noqa: E402

CONTEXT, BLOCK_SIZE = 64, 16
STEPS_A_TURN = 10


def even_placement(num_members: int, num_layers: int, num_experts: int) -> Placement:
    return Placement(num_members, (tuple((expert % num_members,) for expert in range(num_experts)),) * num_layers)


def new_runners(folder: Path, rank: int, groups: dict[str, ProcessGroup], num_rows: int) -> dict[str, Runner]:
    args, kernels = read_model_args(folder), select_kernels("cpu", 1)
    placement = even_placement(groups["Gloo"].num_members, args.num_moe_layers, args.num_experts)
    decoder, _ = load_decoder(folder, args, torch.bfloat16, kernels, placement, rank)
    num_blocks = num_rows * (CONTEXT // BLOCK_SIZE + 1) + 1
    threads = HostThreads((1,) * placement.num_members, rank, os.cpu_count() or 1)
    dispatchers = {way: AutoDispatcher(RowExchange(kernels, placement, rank, group.rows, threads=threads))
                   for way, group in groups.items()}
    return {way: Runner(decoder, dispatcher, num_blocks, BLOCK_SIZE) for way, dispatcher in dispatchers.items()}


def plan_of(step: int, num_rows: int) -> StepPlan:
    """One token of each sequence, always the same one of its context: what it costs is what counts."""
    blocks = CONTEXT // BLOCK_SIZE + 1
    return StepPlan(1, step, tuple(
        ScheduledRequest(f"r{row}", (row,), CONTEXT, tuple(range(row * blocks, (row + 1) * blocks)),
                         SamplingSpec(temperature=0.0)) for row in range(num_rows)))


def time_steps(group: ProcessGroup, runner: Runner, first: int, num_rows: int) -> list[float]:
    own_rows, seconds = num_rows if group.rank == 0 else 0, []
    for step in range(first, first + STEPS_A_TURN):
        began_s = time.perf_counter()
        headers = group.agree(StepHeader(1, step, own_rows))
        runner.execute(plan_of(step, own_rows), tuple(header.num_tokens for header in headers))
        seconds.append(time.perf_counter() - began_s)
    return seconds


def member(rank: int, folder: Path, rows: list[int], num_steps: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    groups = join_all(rank, rendezvous, pipe)
    runners = new_runners(folder, rank, groups, max(rows))
    for num_rows in rows:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for first in range(0, num_steps + STEPS_A_TURN, STEPS_A_TURN):
            for way in WAYS:
                took = time_steps(groups[way], runners[way], first, num_rows)
                seconds[way] += took if first else []       # the first turn warms up
        pipe.send({way: statistics.median(each) for way, each in seconds.items()})
    pipe.recv()
    for group in groups.values():
        group.close()


def run(num_members: int, folder: Path, rows: list[int], num_steps: int) -> list[dict[str, object]]:
    pipes, processes = start_members(member, num_members, folder, rows, num_steps)
    results: list[dict[str, object]] = []
    for num_rows in rows:
        first = [pipe.recv() for pipe in pipes][0]
        results.append({"members": num_members, "rows": num_rows, "step_ms": {
            way: round(first[way] * 1e3, 2) for way in WAYS}})
        print(f"| {num_members} | {num_rows} | " + " | ".join(f"{first[way] * 1e3:.2f}" for way in WAYS) + " |",
              flush=True)
    end_members(pipes, processes)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--members", type=numbers, default=[2, 3])
    parser.add_argument("--rows", type=numbers, default=[1, 16])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print("| members | rows | " + " | ".join(f"{way}, ms" for way in WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    results = [result for num_members in options.members
               for result in run(num_members, options.folder, options.rows, options.steps)]
    print(json.dumps({"benchmark": "sharded_step", "model": options.folder.name, **describe(), "results": results}))


if __name__ == "__main__":
    main()
