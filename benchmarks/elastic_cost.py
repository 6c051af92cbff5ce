"""What it costs that members may come and go, when none does: tokens/s of this tree beside those of another one.

A local group of each tree (benchmarks/local_group) is up all the time; rounds ask one after the other the same greedy
questions, in turns as to who is first, and nothing else happens. Both place each expert once, evenly. Of each: tokens/s
and CPU seconds of its shards for a thousand tokens; the cost is the median over rounds of before over after, less 1.
The other tree must have this one's coordinator and links, as one with a change taken out has; it has to be built.
Without --before it is this one, which shows the noise. The last line of stdout is one JSON object.

  (cd ../before && python setup.py -q build_generated)
  python benchmarks/elastic_cost.py --before ../before --rounds 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BOUND = 0.02
ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS, FIRST_TOKEN_ID = 64, 300
_MEMORY_BYTES = 1 << 30
_KV_CACHE_BYTES = 64 << 20


class Tree:
    """A group of one tree, in processes of its own: modules of both have the same names."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.tokens_per_s: list[float] = []
        self.cpu_s: list[float] = []        # for a thousand tokens
        command = [sys.executable, __file__, "--model", options.model, "--members", str(options.members),
                   "--streams", str(options.streams), "--tokens", str(options.tokens), "--is-group"]
        self._process = subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, is_counted: bool) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("ask\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        if is_counted:
            self.tokens_per_s.append(found["tokens"] / found["seconds"])
            self.cpu_s.append(1e3 * found["cpu_s"] / found["tokens"])

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def figures(self) -> dict[str, float]:
        return {"tokens_per_s": round(statistics.median(self.tokens_per_s), 1),
                "cpu_s_per_1000_tokens": round(statistics.median(self.cpu_s), 3)}


async def be_group(options: argparse.Namespace) -> None:
    """Run a group of the tree that PYTHONPATH names, and answer each line of stdin with what a round took."""
    from benchmarks.local_group.group import LocalGroup
    from benchmarks.local_group.questions import Question
    from benchmarks.local_group.setup import checkpoint
    from benchmarks.local_group.streams import answers_of
    from model.args import read_model_args
    from serving.config import parse_config

    folder, draw = checkpoint(options.model), random.Random(1)
    vocabulary = range(FIRST_TOKEN_ID, read_model_args(folder).vocab_size)
    questions = [Question(number, tuple(draw.choices(vocabulary, k=PROMPT_TOKENS)), options.tokens,
                          {"temperature": 0.0}) for number in range(options.streams)]
    with tempfile.TemporaryDirectory() as logs:
        async with LocalGroup(parse_config(config_of(folder, options)), Path(logs)) as group:
            group.start_all([f"n{index}" for index in range(options.members)])
            await group.until_serving()
            address = next(iter((await group.router_addresses()).values()))
            while await asyncio.to_thread(sys.stdin.readline):
                began_s, cpu_s = time.monotonic(), cpu_seconds(group)
                answers = await answers_of(group.config.model.served_name, questions, address)
                print(json.dumps({"seconds": time.monotonic() - began_s, "cpu_s": cpu_seconds(group) - cpu_s,
                                  "tokens": sum(len(answer.token_ids) for answer in answers)}), flush=True)


def config_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return a config that both trees take."""
    return {"http_port": 0, "model": {"path": str(folder), "name": folder.name, "max_model_len": 8192},
            "pools": [{"name": "cpu", "replicas": options.members, "num_threads": 1, "kv_cache": _KV_CACHE_BYTES,
                       "memory_budget": _MEMORY_BYTES}],
            "router": {"grpc_port": 0}, "placement": {"policy": "even", "rebalance_margin": None}}


def cpu_seconds(group: Any) -> float:
    """Return the CPU time that the shards' processes have taken."""
    stats = [Path(f"/proc/{shard.pid}/stat").read_text(encoding="utf-8") for shard in group.alive("shard")]
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Ask the groups of both trees in turns, and return what the last line says."""
    before, after = Tree(options.before.resolve(), options), Tree(ROOT, options)
    try:
        for number in range(-1, options.rounds):        # the first warms up
            for tree in (before, after) if number % 2 else (after, before):
                tree.ask(is_counted=number >= 0)
    finally:
        before.end()
        after.end()
    costs = [early / late - 1 for early, late in zip(before.tokens_per_s, after.tokens_per_s, strict=True)]
    cpu = [late / early - 1 for early, late in zip(before.cpu_s, after.cpu_s, strict=True)]
    return {"before": before.figures(), "after": after.figures(), "cost": round(statistics.median(costs), 4),
            "cost_of_rounds": [round(cost, 4) for cost in costs], "cpu_cost": round(statistics.median(cpu), 4),
            "bound": BOUND}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, default=ROOT, help="the other tree; default: this one, to see the noise")
    parser.add_argument("--model", default="small", help="of make_checkpoint.py, or a folder")
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--is-group", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    if options.is_group:
        asyncio.run(be_group(options))
        return
    found = compare(options)
    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import describe
    print(json.dumps({"benchmark": "elastic_cost", "model": options.model, "members": options.members,
                      "streams": options.streams, **found, "machine": describe()}))


if __name__ == "__main__":
    main()
