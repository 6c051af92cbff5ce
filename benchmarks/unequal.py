"""Unequal nodes, as real shards of a real local cluster: tokens/s beside what each makes alone, and even placement.

Speeds are emulated (every shard computes for real, then waits as if slower): one run starts, one after the other,
* alone: one shard of each different speed that holds the whole model
* speed: all shards, placed and shared out by what was measured, then once more for the expert load that was counted
  and the work that was timed
* again: the fastest shard alone once more: how much faster or slower the machine has become meanwhile
* fewer: as `speed`, without the last node: a slow node more is to make no group slower
* even: all shards, experts and requests alike for all, as systems without unequal shards do
each at every number of rows a step. The bound is the sum of what the nodes make alone at as many rows. With `speed` a
node has memory for its part of the experts by speed and --spare more, so that none holds the whole model (without the
last node the others have its part too); with `even` all have the same, and as much in all.

  python benchmarks/unequal.py --speeds 4:2:1:1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from machine import describe
from make_checkpoint import default_dir, make

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster.device.node import free_port
from cluster.launch.bring_up import BringUp, take_down  # noqa: E402
from cluster.launch.cluster_client import ClusterClient  # noqa: E402
from cluster.launch.state_file import RunningCluster  # noqa: E402
from cluster.planner.memory_demand import memory_demand  # noqa: E402
from cluster.planner.memory_plan import MemoryDemand  # noqa: E402
from model.args import read_model_args  # noqa: E402
from serving.config import ServeConfig  # noqa: E402
from serving.link.channel_options import DIRECT  # noqa: E402
from serving.proto import inference_pb2, inference_pb2_grpc  # noqa: E402

LOAD_REPORT_S = 6.0         # shards tell the coordinator their expert loads every 5 s
WARM_TOKENS = 20
WAIT_S = 900.0
PROCESS_BYTES = 480 << 20
KV_CACHE_BYTES = 256 << 20
KINDS = ("alone", "speed", "again", "fewer", "even")
_numbers = itertools.count()


@dataclass
class Wave:
    """Sequences that all decode at once. Times of tokens are those at the client."""

    sequences_s: list[list[float]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Return the speed while all are decoding. The window opens and closes between two steps: half a step after a
        token of the sequence that ended first, so that a step's tokens, which arrive in a burst, are all in it or
        all not."""
        all_began_s = max(times[0] for times in self.sequences_s)
        first_to_end = min(self.sequences_s, key=lambda times: times[-1])
        steps_s = [time_s for time_s in first_to_end if time_s > all_began_s]
        half_step_s = (steps_s[-1] - steps_s[0]) / (len(steps_s) - 1) / 2
        begin_s, end_s = steps_s[0] + half_step_s, steps_s[-1] + half_step_s
        return sum(begin_s < time_s <= end_s for times in self.sequences_s for time_s in times) / (end_s - begin_s)


async def decode(address: str, model: str, prompts: list[list[int]], num_tokens: int) -> Wave:
    wave = Wave()
    async with grpc.aio.insecure_channel(address, options=DIRECT) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def one(prompt: list[int]) -> None:
            times: list[float] = []
            request = inference_pb2.GenerateRequest(
                model=model, token_ids=inference_pb2.TokenIds(ids=prompt), request_id=f"bench-{next(_numbers)}",
                sampling=inference_pb2.Sampling(max_tokens=num_tokens, ignore_eos=True, seed=prompt[0]))
            async for answer in stub.Generate(request, timeout=WAIT_S):
                times += [time.monotonic()] * len(answer.token_ids)
            wave.sequences_s.append(times)

        await asyncio.gather(*(one(prompt) for prompt in prompts))
    return wave


def prompts_of(options: argparse.Namespace, num: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    vocabulary = range(300, read_model_args(default_dir(options.model)).vocab_size)
    return [draw.choices(vocabulary, k=options.prompt_tokens) for _ in range(num)]


def budget_of(part: float, options: argparse.Namespace, demand: MemoryDemand) -> int:
    """Return the budget for so large a part of the experts, and once more for those of a layer: a change takes that."""
    copies = part * (1 + options.spare) * demand.num_slots
    return int(PROCESS_BYTES + demand.fixed_bytes + copies * (1 + 1 / demand.num_moe_layers) * demand.expert_bytes)


def config_of(options: argparse.Namespace, speeds: list[float], policy: str, num_rows: int) -> ServeConfig:
    """Return a config that is planned for `num_rows` a step."""
    free = ServeConfig.model_validate(content_of(options, speeds, policy, num_rows, [None] * len(speeds)))
    if len(speeds) == 1:
        return free
    demand = memory_demand(read_model_args(default_dir(options.model)), free, len(speeds))
    budgets = [budget_of(speed / sum(speeds), options, demand) for speed in speeds]
    if policy == "even":        # as much memory in all, but alike: by speed the slow ones could not hold their part
        budgets = [sum(budgets) // len(budgets)] * len(budgets)
    return ServeConfig.model_validate(content_of(options, speeds, policy, num_rows, budgets))


def content_of(options: argparse.Namespace, speeds: list[float], policy: str, num_rows: int,
               budgets: Sequence[int | None]) -> dict[str, object]:
    rows = max(options.rows)
    names = [f"n{index}" for index in range(len(speeds))]
    return {
        "application": f"unequal-{policy}", "http_port": free_port(), "proxy_port": free_port(),
        "model": {"path": str(default_dir(options.model)), "name": options.model, "max_model_len": 1024},
        "pools": [{"name": name, "num_cpus": 0.1, "num_threads": 1, "resources": {name: 1}, "emulated_speed": speed,
                   "kv_cache": KV_CACHE_BYTES, "memory_budget": budget}
                  for name, speed, budget in zip(names, speeds, budgets, strict=True)],
        "router": {"num_cpus": 0.1, "grpc_port": free_port(),
                   "admission": {"max_open_requests": 2 * rows, "default_deadline_s": WAIT_S}},
        "scheduler": {"max_batch_tokens": 2 * rows, "max_running_requests": rows},
        "group": {"collective_timeout_s": 300},
        "placement": {"policy": policy, "num_rows": num_rows, "context_tokens": 64, "rebalance_margin": None},
        "local_nodes": [{"name": name, "num_cpus": 1, "resources": {name: 1}} for name in names]}


def measure_alone(options: argparse.Namespace, speed: float) -> dict[str, float]:
    """Return the tokens/s of one node at every number of rows."""
    with served(config_of(options, [speed], "speed", max(options.rows))) as running:
        return {f"rows_{rows}": decoded(options, running, rows, options.alone_steps, 0) for rows in options.rows}


def measure_group(options: argparse.Namespace, speeds: list[float], policy: str) -> dict[str, dict[str, object]]:
    """Return the same of a group, planned for each number of rows, and what was planned."""
    found: dict[str, dict[str, object]] = {}
    for rows in options.rows:
        config = config_of(options, speeds, policy, rows)
        with served(config) as running:
            if policy == "speed":
                warm(options, running, rows)
            runs = [decoded(options, running, rows, options.steps, seed) for seed in range(options.repeats)]
            found[f"rows_{rows}"] = {"tokens_per_s": statistics.median(runs), "runs": runs, **planned(running),
                                     "memory_budgets": [pool.memory_budget for pool in config.pools]}
    return found


@contextlib.contextmanager
def served(config: ServeConfig) -> Iterator[RunningCluster]:
    with tempfile.TemporaryDirectory() as folder:
        running = BringUp(config, Path(folder), lambda progress: None).run()
        try:
            yield running
        finally:
            take_down(running, Path(folder))


def decoded(options: argparse.Namespace, running: RunningCluster, rows: int, num_steps: int, seed: int) -> float:
    prompts = prompts_of(options, rows, seed)
    tokens_per_s = asyncio.run(decode(running.grpc_address, options.model, prompts, num_steps)).tokens_per_s
    print(f"{running.application}: {rows} rows: {tokens_per_s:.1f} tokens/s", file=sys.stderr)
    return tokens_per_s


def warm(options: argparse.Namespace, running: RunningCluster, rows: int) -> None:
    """Let the experts' loads be counted and the members' work be timed, and have the placement made for them."""
    prompts = prompts_of(options, rows, 99)
    asyncio.run(decode(running.grpc_address, options.model, prompts, WARM_TOKENS))
    time.sleep(LOAD_REPORT_S)
    with ClusterClient.connected(running) as client:
        change = client.change_placement("counted", "for the counted load", None)
        while change.state == "running":
            time.sleep(0.5)
            change = client.placement().epoch.changes[-1]
        if change.state != "done":
            raise SystemExit(f"the placement for the counted load failed: {change.detail}")


def planned(running: RunningCluster) -> dict[str, object]:
    with ClusterClient.connected(running) as client:
        epoch = client.placement().epoch
    assert epoch.figures is not None
    return {"expert_copies": [epoch.placement.num_experts_of(rank) for rank in range(len(epoch.members))],
            "request_shares": [round(share.fraction, 4) for share in epoch.shares],
            "predicted_tokens_per_s": epoch.figures.tokens_per_s,
            "planned_ratio_to_bound": epoch.figures.ratio}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", default="4:2:1:1", help="of the nodes, relative")
    parser.add_argument("--sum-of-speeds", type=float, default=0.5, help="of all nodes together, emulated")
    parser.add_argument("--model", default="vast", help="of make_checkpoint.py")
    parser.add_argument("--rows", type=lambda text: [int(rows) for rows in text.split(",")], default=[256, 64])
    parser.add_argument("--prompt-tokens", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16, help="decoded by the groups in each repeat")
    parser.add_argument("--alone-steps", type=int, default=6, help="decoded by a node alone in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spare", type=float, default=0.15, help="memory for copies, of a node's part of the experts")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Run it in a process of its own: a driver can connect to several clusters in turn, but what it leaves disturbs."""
    command = [sys.executable, __file__, "--only", kind, "--speeds", options.speeds, "--model", options.model,
               "--sum-of-speeds", str(options.sum_of_speeds), "--rows", ",".join(map(str, options.rows)),
               "--prompt-tokens", str(options.prompt_tokens), "--steps", str(options.steps),
               "--alone-steps", str(options.alone_steps), "--repeats", str(options.repeats),
               "--spare", str(options.spare)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{kind} failed, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace, speeds: list[float], kind: str) -> dict[str, Any]:
    """Measure one kind of the module's list."""
    if kind == "alone":
        return {f"{speed:g}": measure_alone(options, speed) for speed in sorted(set(speeds), reverse=True)}
    if kind == "again":
        return measure_alone(options, max(speeds))
    if kind == "fewer":
        return measure_group(options, speeds[:-1], "speed")
    return measure_group(options, speeds, kind)


def compare(options: argparse.Namespace, speeds: list[float],
            found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return a row of the table for each number of rows."""
    table: dict[str, dict[str, float]] = {}
    fastest = f"{max(speeds):g}"
    for rows in options.rows:
        key = f"rows_{rows}"
        bound = sum(found["alone"][f"{speed:g}"][key] for speed in speeds)
        even, ours, fewer = (found[kind][key]["tokens_per_s"] for kind in ("even", "speed", "fewer"))
        table[key] = {"bound": bound, "even": even, "speed": ours, "speed/bound": ours / bound,
                      "even/bound": even / bound, "speed/even": ours / even, "speed/fewer": ours / fewer,
                      "speed/predicted": ours / found["speed"][key]["predicted_tokens_per_s"],
                      "again/alone": found["again"][key] / found["alone"][fastest][key]}
        print(f"{rows} rows a step: " + ", ".join(f"{name} {value:.3f}" for name, value in table[key].items()))
    return table


def main() -> None:
    options = parse_options()
    relative = [float(part) for part in options.speeds.split(":")]
    speeds = [part * options.sum_of_speeds / sum(relative) for part in relative]
    if not default_dir(options.model).exists():
        make(options.model, default_dir(options.model), 0)
    if options.only:
        print(json.dumps(measure(options, speeds, options.only)))
        return
    found = {kind: run_apart(options, kind) for kind in KINDS}
    table = compare(options, speeds, found)
    print(json.dumps({"benchmark": "unequal", "speeds": options.speeds, "emulated_speeds": speeds,
                      "model": options.model, "tokens_per_s": table, **found, "machine": describe()}))


if __name__ == "__main__":
    main()
