"""Measures how much of an endless prefix cache's reuse a hybrid's real scheduler reaches in bounded memory.

`python benchmarks/state_reuse.py TRACE.csv... [--memory 32GB ...]`. A trace has the columns timestamp_s, input_tokens,
output_tokens, hash_ids (ids of 512-token blocks of the prompt, as Mooncake's traces): rows share a prefix as far as
their leading ids agree. The scheduler is the one that shards run, with KV blocks and state slots as the memory plan
divides `--memory` for the model; the model is not run, and time is simulated: a step takes --overhead-ms and its tokens
--tokens-per-s. Endless: prefix blocks of the scheduler's size, whose content any earlier row has had, in order of
arrival. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from cluster.planner.cache_plan import divide_cache  # noqa: E402
from model.args import parse_model_args  # noqa: E402
from model.json_file import read_json_object  # noqa: E402
from model.step import SampledToken, SamplingSpec, StepPlan, StepResult  # noqa: E402
from serving.config import ServeConfig, parse_config  # noqa: E402
from serving.engine.block_manager import block_hash  # noqa: E402
from serving.engine.request import Request, Submission  # noqa: E402
from serving.engine.scheduler import Scheduler  # noqa: E402
from serving.option_types import parse_bytes  # noqa: E402

TRACE_BLOCK = 512
OUTPUT_TOKEN = 1 << 60          # in no prompt: what a model answered is not in the trace
MODEL = Path(__file__).parent.parent / "examples/models/Qwen3.5-35B-A3B.json"


@dataclass(frozen=True)
class Row:
    arrival_s: float
    prompt: tuple[int, ...]
    num_output: int


@dataclass(frozen=True)
class Result:
    trace: str
    memory_bytes: int
    num_kv_blocks: int
    num_state_slots: int
    num_requests: int
    num_prompt_tokens: int
    num_endless_tokens: int     # that an endless cache of blocks would serve
    num_cached_tokens: int      # that were served
    num_preemptions: int
    simulated_s: float

    @property
    def ratio(self) -> float:
        return self.num_cached_tokens / self.num_endless_tokens if self.num_endless_tokens else 1.0


def read_trace(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = []
        for index, row in enumerate(csv.DictReader(file)):
            ids = [int(text) for text in row["hash_ids"].split()]
            # The last block may be part of 512 tokens: it is cut, so ids that agree are tokens that agree.
            prompt = [token for one in ids for token in range(one * TRACE_BLOCK, (one + 1) * TRACE_BLOCK)]
            own = range((1 << 40) + index * (1 << 20), (1 << 40) + (index + 1) * (1 << 20))     # where ids say nothing
            length = int(row["input_tokens"])
            prompt = prompt[:length] + list(own[:max(0, length - len(prompt))])
            rows.append(Row(float(row["timestamp_s"]), tuple(prompt), max(1, int(row["output_tokens"]))))
    return rows


def endless_tokens(rows: Sequence[Row], block_size: int) -> int:
    """Return the prompt tokens that a cache without bound would serve, by the scheduler's rule that the last token is
    always computed."""
    known: set[bytes] = set()
    num_tokens = 0
    for row in rows:
        parent, is_prefix = b"", True
        for block in range(len(row.prompt) // block_size):
            parent = block_hash(parent, row.prompt[block * block_size:(block + 1) * block_size])
            is_prefix = is_prefix and parent in known and (block + 1) * block_size < len(row.prompt)
            num_tokens += block_size * is_prefix
            known.add(parent)
    return num_tokens


class Simulation:
    """Feeds a scheduler with a trace, a step at a time."""

    def __init__(self, scheduler: Scheduler, tokens_per_s: float, overhead_s: float) -> None:
        self.scheduler = scheduler
        self.now_s = 0.0
        self.num_cached_tokens = 0
        self._tokens_per_s, self._overhead_s = tokens_per_s, overhead_s
        self._step_index = 0

    def run(self, rows: Sequence[Row]) -> None:
        waiting = list(rows)[::-1]
        while waiting or self.scheduler.has_work():
            if not self.scheduler.has_work():
                self.now_s = max(self.now_s, waiting[-1].arrival_s)
            while waiting and waiting[-1].arrival_s <= self.now_s:
                self._add(waiting.pop(), len(waiting))
            self._step()

    def _add(self, row: Row, number: int) -> None:
        submission = Submission(str(number), row.prompt, SamplingSpec(seed=0), row.num_output)
        assert self.scheduler.add(Request(submission, "router", self.now_s)) is None

    def _step(self) -> None:
        requests = self.scheduler.schedule(self.now_s)
        assert requests, "somebody can always run"
        tokens = tuple(SampledToken(one.request_id, None if one.sampling is None else OUTPUT_TOKEN) for one in requests)
        plan = StepPlan(1, self._step_index, requests)
        for event in self.scheduler.apply(plan, StepResult(1, self._step_index, tokens)):
            self.num_cached_tokens += event.num_cached_tokens or 0
        self._step_index += 1
        self.now_s += self._overhead_s + plan.num_tokens / self._tokens_per_s


def measure(path: Path, config: ServeConfig, memory_bytes: int, options: argparse.Namespace) -> Result:
    args, rows = parse_model_args(read_json_object(options.model)), read_trace(path)
    sizes = divide_cache(args, config, memory_bytes)
    scheduler = Scheduler(config.scheduler, sizes.num_blocks, args.context_limit, sizes.num_state_slots)
    simulation = Simulation(scheduler, options.tokens_per_s, options.overhead_ms / 1e3)
    simulation.run(rows)
    return Result(path.stem, memory_bytes, sizes.num_blocks, sizes.num_state_slots, len(rows),
                  sum(len(row.prompt) for row in rows), endless_tokens(rows, config.scheduler.block_size),
                  simulation.num_cached_tokens, scheduler.num_preemptions, round(simulation.now_s, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, default=MODEL, help="config.json of a hybrid")
    parser.add_argument("--memory", nargs="+", default=["64GB"], help="of KV cache and states together")
    parser.add_argument("--context-tokens", type=int, default=16384, help="that the memory plan divides for")
    parser.add_argument("--interval", type=int, help="scheduler.snapshot_interval_tokens; default: the option's own")
    parser.add_argument("--tokens-per-s", type=float, default=50_000.0)
    parser.add_argument("--overhead-ms", type=float, default=10.0, help="of a step")
    options = parser.parse_args()
    scheduler = {} if options.interval is None else {"snapshot_interval_tokens": options.interval}
    config = parse_config({"model": {"path": "x"}, "pools": [{}], "scheduler": scheduler,
                           "placement": {"context_tokens": options.context_tokens}})
    print("| trace | memory | KV blocks | state slots | prompt tokens | endless | served | ratio | preempted |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for path in options.traces:
        for memory in options.memory:
            found = measure(path, config, parse_bytes(memory), options)
            results.append(asdict(found) | {"ratio": found.ratio})
            print(f"| {found.trace} | {memory} | {found.num_kv_blocks:,} | {found.num_state_slots:,} "
                  f"| {found.num_prompt_tokens:,} | {found.num_endless_tokens:,} | {found.num_cached_tokens:,} "
                  f"| {found.ratio:.3f} | {found.num_preemptions} |", flush=True)
    print(json.dumps({"benchmark": "state_reuse", **describe(), "interval": config.scheduler.snapshot_interval_tokens,
                      "results": results}))


if __name__ == "__main__":
    main()
