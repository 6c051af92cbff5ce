"""Unequal nodes, as real shards of a real local cluster: tokens/s beside what each makes alone, and even placement.

Speeds are emulated (every shard computes for real, then waits as if slower): one run starts, one after the other,
* alone: one shard of each different speed that holds the whole model
* even: all shards, experts and requests alike for all, as systems without unequal shards do
* speed: all shards, placed and shared out by what was measured, then once more for the expert load that was counted
each at every number of rows a step. The bound is the sum of what the nodes make alone at as many rows.

  python benchmarks/unequal.py --speeds 4:2:1:1
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from machine import describe
from make_checkpoint import default_dir, make
from startup import free_port

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster.bring_up import BringUp, take_down  # noqa: E402
from cluster.cluster_client import ClusterClient  # noqa: E402
from cluster.state_file import RunningCluster  # noqa: E402
from serving.config import ServeConfig, parse_config  # noqa: E402
from serving.proto import inference_pb2, inference_pb2_grpc  # noqa: E402

LOAD_REPORT_S = 6.0         # shards tell the coordinator their expert loads every 5 s
WARM_TOKENS = 4
WAIT_S = 900.0
_numbers = itertools.count()


@dataclass
class Wave:
    """Sequences that all decode at once. Times of tokens are those at the client."""

    first_s: list[float] = field(default_factory=list)     # of each sequence
    last_s: list[float] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """While all are decoding: from the last first token to the first last one."""
        begin_s, end_s = max(self.first_s), min(self.last_s)
        return sum(begin_s < token_s <= end_s for token_s in self.tokens_s) / (end_s - begin_s)


async def decode(address: str, model: str, prompts: list[list[int]], num_tokens: int) -> Wave:
    wave = Wave()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def one(prompt: list[int]) -> None:
            times: list[float] = []
            request = inference_pb2.GenerateRequest(
                model=model, token_ids=inference_pb2.TokenIds(ids=prompt), request_id=f"bench-{next(_numbers)}",
                sampling=inference_pb2.Sampling(max_tokens=num_tokens, ignore_eos=True, temperature=0.0))
            async for answer in stub.Generate(request, timeout=WAIT_S):
                times += [time.monotonic()] * len(answer.token_ids)
            wave.first_s.append(times[0])
            wave.last_s.append(times[-1])
            wave.tokens_s.extend(times)

        await asyncio.gather(*(one(prompt) for prompt in prompts))
    return wave


def prompts_of(num: int, num_tokens: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(300, 16_000), k=num_tokens) for _ in range(num)]


def config_of(options: argparse.Namespace, speeds: list[float], policy: str) -> ServeConfig:
    rows = max(options.rows)
    names = [f"n{index}" for index in range(len(speeds))]
    return parse_config({
        "application": f"unequal-{policy}", "http_port": free_port(),
        "model": {"path": str(default_dir(options.model)), "name": options.model, "max_model_len": 1024},
        "pools": [{"name": name, "num_cpus": 0.1, "num_threads": 1, "resources": {name: 1}, "emulated_speed": speed,
                   "kv_cache": "512MB"} for name, speed in zip(names, speeds, strict=True)],
        "router": {"num_cpus": 0.1, "grpc_port": free_port(),
                   "admission": {"max_open_requests": 2 * rows, "default_deadline_s": WAIT_S}},
        "scheduler": {"max_batch_tokens": 2 * rows, "max_running_requests": rows},
        "group": {"collective_timeout_s": 300},
        "placement": {"policy": policy, "num_rows": rows, "context_tokens": 64, "rebalance_margin": None},
        "local_nodes": [{"name": name, "num_cpus": 1, "resources": {name: 1}} for name in names]})


def measure(options: argparse.Namespace, speeds: list[float], policy: str, num_steps: int) -> dict[str, object]:
    """Tokens/s at every number of rows, and what the coordinator planned."""
    config = config_of(options, speeds, policy)
    with tempfile.TemporaryDirectory() as folder:
        running = BringUp(config, Path(folder), lambda progress: None).run()
        try:
            found: dict[str, object] = {}
            if len(speeds) > 1 and policy == "speed":
                warm(options, running)
            for rows in options.rows:
                runs = [asyncio.run(decode(running.grpc_address, options.model, prompts_of(
                    rows, options.prompt_tokens, seed), num_steps)).tokens_per_s for seed in range(options.repeats)]
                found[f"rows_{rows}"] = statistics.median(runs)
                print(f"{policy} {speeds}: {rows} rows: {', '.join(f'{run:.1f}' for run in runs)} tokens/s",
                      file=sys.stderr)
            return found | planned(running)
        finally:
            take_down(running, Path(folder))


def warm(options: argparse.Namespace, running: RunningCluster) -> None:
    """Let the experts' loads be counted, and have the placement made for them."""
    asyncio.run(decode(running.grpc_address, options.model, prompts_of(max(options.rows), options.prompt_tokens, 99),
                       WARM_TOKENS))
    time.sleep(LOAD_REPORT_S)
    with ClusterClient.connected(running) as client:
        client.change_placement("counted", "for the counted load", None)
        while client.placement().epoch.changes[-1].state == "running":
            time.sleep(0.5)


def planned(running: RunningCluster) -> dict[str, object]:
    with ClusterClient.connected(running) as client:
        epoch = client.placement().epoch
    return {"expert_copies": [epoch.placement.num_experts_of(rank) for rank in range(len(epoch.members))],
            "request_shares": [round(share.share, 4) for share in epoch.shares],
            "changes": [(change.state, change.detail) for change in epoch.changes],
            "predicted_step_s": epoch.figures.step_s if epoch.figures else None}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", default="4:2:1:1", help="of the nodes, relative")
    parser.add_argument("--sum-of-speeds", type=float, default=0.5, help="of all nodes together, emulated")
    parser.add_argument("--model", default="wide", help="of make_checkpoint.py")
    parser.add_argument("--rows", type=lambda text: [int(rows) for rows in text.split(",")], default=[256, 64])
    parser.add_argument("--prompt-tokens", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24, help="decoded by the groups in each repeat")
    parser.add_argument("--alone-steps", type=int, default=6, help="decoded by a node alone in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["alone", "even", "speed"], help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(options: argparse.Namespace, kind: str) -> dict[str, object]:
    """In a process of its own: a driver can connect to one cluster after the other, but what it leaves may disturb."""
    command = [sys.executable, __file__, "--only", kind, "--speeds", options.speeds, "--model", options.model,
               "--sum-of-speeds", str(options.sum_of_speeds), "--rows", ",".join(map(str, options.rows)),
               "--prompt-tokens", str(options.prompt_tokens), "--steps", str(options.steps),
               "--alone-steps", str(options.alone_steps), "--repeats", str(options.repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{kind} failed, see above")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = parse_options()
    relative = [float(part) for part in options.speeds.split(":")]
    speeds = [part * options.sum_of_speeds / sum(relative) for part in relative]
    if not default_dir(options.model).exists():
        make(options.model, default_dir(options.model), 0)
    if options.only == "alone":
        print(json.dumps({f"{speed:g}": measure(options, [speed], "speed", options.alone_steps)
                          for speed in sorted(set(speeds), reverse=True)}))
        return
    if options.only:
        print(json.dumps(measure(options, speeds, options.only, options.steps)))
        return
    alone, even, ours = (run_apart(options, kind) for kind in ("alone", "even", "speed"))
    table = {}
    for rows in options.rows:
        key = f"rows_{rows}"
        bound = sum(alone[f"{speed:g}"][key] for speed in speeds)       # type: ignore[index]
        table[key] = {"bound": bound, "even": even[key], "speed": ours[key], "speed/bound": ours[key] / bound,  # type: ignore[operator]
                      "even/bound": even[key] / bound, "speed/even": ours[key] / even[key]}     # type: ignore[operator]
        print(f"{rows} rows a step: " + ", ".join(f"{name} {value:.3f}" for name, value in table[key].items()))
    print(json.dumps({"benchmark": "unequal", "speeds": options.speeds, "emulated_speeds": speeds,
                      "model": options.model, "tokens_per_s": table, "alone": alone, "even": even, "speed": ours,
                      "machine": describe()}))


if __name__ == "__main__":
    main()
