"""The config of a local group, its checkpoint, and the run that is not disturbed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.local_group.group import LocalGroup
from benchmarks.local_group.questions import Answer, Question, new_questions
from benchmarks.local_group.streams import Streams, answers_of
from benchmarks.make_checkpoint import default_dir, make
from cluster.planner.memory_demand import memory_demand
from model.args import read_model_args
from model.memory import kv_block_bytes
from serving.config import ServeConfig, parse_config

_PROCESS_BYTES = 480 << 20      # of a process with torch, and what it grows by
_SPARE = 0.15                   # of a member's memory for experts, beyond its even part
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Load:
    """What clients ask for."""

    num_greedy: int = 32
    num_sampled: int = 8
    longest_prompt: int = 1024
    max_tokens: tuple[int, int] = (600, 1400)

    @property
    def num_streams(self) -> int:
        return self.num_greedy + self.num_sampled


@dataclass(frozen=True)
class Trial:
    """What is asked of a group, and what is right."""

    config: ServeConfig
    questions: list[Question]
    expected: list[Answer]


Measure = Callable[[argparse.Namespace, Load, int, Path], Coroutine[None, None, dict[str, object]]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="small", help="of make_checkpoint.py, or a folder")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--copies", type=int, choices=(1, 2), default=2, help="of every expert, at least")
    parser.add_argument("--speed", type=float, help="emulated, of every member: less of the processor is used")
    parser.add_argument("--seed", type=int, help="of what is drawn; default: another each time")
    parser.add_argument("--logs", type=Path, help="folder that keeps the processes' logs")


def run_benchmark(options: argparse.Namespace, measure: Measure) -> dict[str, object]:
    """Return what measuring finds, with the seed that is shown first, and a folder for logs."""
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else int(options.seed)
    print(f"seed {seed}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        folder = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        return asyncio.run(measure(options, Load(), seed, folder))


def checkpoint(name: str) -> Path:
    """Return the folder of a model of make_checkpoint.py, or the folder that is given."""
    folder = Path(name) if Path(name).is_dir() else default_dir(name)
    if not folder.exists():
        make(name, folder, 0)
    return folder


def config_of(folder: Path, options: argparse.Namespace, load: Load, num_routers: int = 1) -> ServeConfig:
    """Return a config in which a member has memory for the whole model; with one copy only for its part when one member
    is missing. Its KV cache holds half of what is asked for when all is nearly done."""
    args = read_model_args(folder)
    block_bytes = kv_block_bytes(args, _BLOCK_SIZE, dtype_bytes=2)
    kv_bytes = load.num_streams * (load.longest_prompt + load.max_tokens[1]) // (2 * _BLOCK_SIZE) * block_bytes
    content: dict[str, Any] = {
        "http_port": 0, "model": {"path": str(folder), "name": folder.name, "max_model_len": 8192},
        "pools": [{"name": "cpu", "replicas": options.members, "max_replicas": options.members + 1, "num_threads": 1,
                   "kv_cache": kv_bytes, "emulated_speed": options.speed}],
        # Moved sequences are computed again beside the streams that go on, whose steps last as long.
        "scheduler": {"block_size": _BLOCK_SIZE, "max_batch_tokens": 256, "max_running_requests": 64},
        "router": {"grpc_port": 0, "replicas": num_routers},
        "placement": {"min_copies": options.copies, "rebalance_margin": None}}
    part = 1.0 if options.copies > 1 else (1 + _SPARE) / max(1, options.members - 1)
    demand = memory_demand(args, parse_config(content), options.members)
    expert_bytes = part * (demand.num_slots + demand.num_slots / demand.num_moe_layers) * demand.expert_bytes
    content["pools"][0]["memory_budget"] = int(_PROCESS_BYTES + demand.fixed_bytes + expert_bytes)
    return parse_config(content)


@asynccontextmanager
async def running_group(options: argparse.Namespace, load: Load, folder: Path,
                        num_routers: int = 1) -> AsyncIterator[LocalGroup]:
    """Run a group of the members that are asked for, with logs in a folder, until the block is left."""
    async with LocalGroup(config_of(checkpoint(options.model), options, load, num_routers), folder) as group:
        group.start_all([f"n{index}" for index in range(options.members)], num_routers)
        yield group


async def new_trial(group: LocalGroup, load: Load, seed: int) -> Trial:
    """Draw questions, and have the group answer them while nothing happens."""
    questions = questions_for(Path(group.config.model.path), load, seed)
    return Trial(group.config, questions, await undisturbed(group, questions))


def questions_for(folder: Path, load: Load, seed: int) -> list[Question]:
    return new_questions(load.num_greedy, load.num_sampled, load.longest_prompt, load.max_tokens,
                         read_model_args(folder).vocab_size, seed)


async def undisturbed(group: LocalGroup, questions: list[Question]) -> list[Answer]:
    """Return the right answers, asked of a group in which nothing happens."""
    await group.until_serving()
    address = next(iter((await group.router_addresses()).values()))
    return await answers_of(group.config.model.served_name, questions, address)


async def prefill_rate(group: LocalGroup, load: Load, seed: int) -> float:
    """Return the prompt tokens a second of a new prompt on an idle group, from the time to its first token."""
    address = next(iter((await group.router_addresses()).values()))
    longest = Load(3, 0, load.longest_prompt, (1, 1))
    rates = []
    for question in questions_for(Path(group.config.model.path), longest, seed + 1):
        asked = replace(question, prompt=question.prompt * -(-load.longest_prompt // len(question.prompt)))
        began_s = time.monotonic()
        await answers_of(group.config.model.served_name, [asked], address)
        rates.append(len(asked.prompt) / (time.monotonic() - began_s))
    return statistics.median(rates)


def read_rate(folder: Path) -> float:
    """Return the bytes a second at which the checkpoint comes from the page cache."""
    num_bytes, began_s = 0, time.monotonic()
    for path in folder.glob("*.safetensors"):
        num_bytes += len(path.read_bytes())
    return num_bytes / (time.monotonic() - began_s)


def new_streams(group: LocalGroup, trial: Trial) -> Streams:
    """Return streams at all routers; the addresses are asked for anew when a router has come or gone."""
    known: dict[str, str] = {}

    async def addresses() -> dict[str, str]:
        live = {router.name for router in group.alive("router")}
        if live != set(known):
            known.clear()
            known.update(await group.router_addresses())
        return dict(known)

    def is_lost(name: str) -> bool:
        return group.named(name).was_killed
    return Streams(trial.config.model.served_name, trial.questions, trial.expected, addresses, is_lost)

