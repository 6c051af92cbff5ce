"""Measures what a tenant that floods does to another's first tokens, and how even two are served that flood both.

`python benchmarks/fairness.py CALM.csv FLOOD.csv`. A trace has the columns timestamp_s, input_tokens, output_tokens.
Admission and scheduler are those of routers and shards, one of each; the model is not run, and time is simulated: a
step takes --overhead-ms and its tokens --tokens-per-s. Five runs: the calm tenant alone; beside the flood, whose trace
is --flood-speed times as fast; the same with both as one tenant, which is first come, first served; and both traces
that fast, to compare what the two were served with the bound of VTC, once more with the first one's weight WEIGHT. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from model.step import SampledToken, SamplingSpec, StepPlan, StepResult  # noqa: E402
from serving.config import AdmissionConfig, SchedulerConfig  # noqa: E402
from serving.engine.request import Request, Submission  # noqa: E402
from serving.engine.scheduler import Scheduler  # noqa: E402
from serving.errors import OverloadedError  # noqa: E402
from serving.router.admission import Admission, Ticket, TicketState  # noqa: E402
from serving.token_counters import MAX_CREDIT, OUTPUT_WEIGHT, PROMPT_WEIGHT, token_cost  # noqa: E402

MAX_MODEL_LEN = 32_768
CALM, FLOOD = 1, 2
EVEN = {CALM: 1, FLOOD: 1}
WEIGHT = 3


@dataclass(frozen=True)
class Ask:
    tenant: int
    arrival_s: float
    num_prompt: int
    num_output: int

    @property
    def cost(self) -> float:
        return token_cost(self.num_prompt, 0, self.num_output)


def read_trace(path: Path, tenant: int, speed: float, seconds: float) -> list[Ask]:
    with path.open(encoding="utf-8", newline="") as file:
        asks = [Ask(tenant, float(row["timestamp_s"]) / speed, int(row["input_tokens"]),
                    max(1, int(row["output_tokens"]))) for row in csv.DictReader(file)]
    return [ask for ask in asks if ask.arrival_s < seconds]


@dataclass
class Outcome:
    """What came of the tenants' requests."""

    ttft_s: dict[int, list[float]] = field(default_factory=lambda: {CALM: [], FLOOD: []})
    num_refused: dict[int, int] = field(default_factory=lambda: {CALM: 0, FLOOD: 0})
    served: dict[int, float] = field(default_factory=lambda: {CALM: 0.0, FLOOD: 0.0})
    served_beside: dict[int, float] = field(default_factory=lambda: {CALM: 0.0, FLOOD: 0.0})    # while both waited
    largest_difference: float = 0.0     # of what two were served in any time in which both waited


class Simulation:
    """One router's admission and one shard's scheduler, a step at a time."""

    def __init__(self, options: argparse.Namespace, names: dict[int, str], weights: dict[int, int] = EVEN) -> None:
        """`names`: what admission and scheduler know the tenants by."""
        self.outcome = Outcome()
        self.now_s = 0.0
        self.scheduler = Scheduler(SchedulerConfig(), options.kv_blocks, MAX_MODEL_LEN)
        self._admission = Admission(AdmissionConfig(), lambda: self.now_s)
        self._names = names
        self._weights = weights
        self._tokens_per_s, self._overhead_s = options.tokens_per_s, options.overhead_ms / 1e3
        self._queued: list[tuple[Ask, Ticket]] = []
        self._open: dict[str, tuple[Ask, Ticket]] = {}
        self._num_steps = self._num_added = 0
        self._num_without_token = {CALM: 0, FLOOD: 0}       # of what is in the shard
        self._least = self._most = 0.0      # of the difference, since both wait
        self._both_wait = False

    def run(self, asks: Sequence[Ask], seconds: float) -> Outcome:
        """Run until all that came within `seconds` has ended."""
        coming = sorted(asks, key=lambda ask: ask.arrival_s, reverse=True)
        while coming or self._queued or self.scheduler.has_work():
            if not self.scheduler.has_work() and coming:
                self.now_s = max(self.now_s, coming[-1].arrival_s)
            while coming and coming[-1].arrival_s <= self.now_s:
                self._offer(coming.pop())
            self._enter()
            if self.now_s <= seconds:
                self._compare()
            else:
                self._both_wait = False
            self._step()
        return self.outcome

    def _offer(self, ask: Ask) -> None:
        ticket = Ticket(self._names[ask.tenant], 1, ask.num_prompt + ask.num_output, ask.cost,
                        weight=self._weights[ask.tenant])
        try:
            self._admission.offer(ticket)
        except OverloadedError:
            self.outcome.num_refused[ask.tenant] += 1
            return
        self._queued.append((ask, ticket))

    def _enter(self) -> None:
        waiting, self._queued = self._queued, []
        for ask, ticket in waiting:
            if ticket.state is TicketState.WAITING:
                self._queued.append((ask, ticket))
                continue
            self._num_added += 1
            name = str(self._num_added)
            prompt = tuple(range(self._num_added << 20, (self._num_added << 20) + ask.num_prompt))
            submission = Submission(name, prompt, SamplingSpec(seed=0), ask.num_output,
                                    tenant=hash(self._names[ask.tenant]), weight=self._weights[ask.tenant])
            assert self.scheduler.add(Request(submission, "router", self.now_s)) is None
            self._open[name] = (ask, ticket)
            self._num_without_token[ask.tenant] += 1

    def _step(self) -> None:
        requests = self.scheduler.schedule(self.now_s)
        if not requests:
            return
        plan = StepPlan(1, self._num_steps, requests)
        tokens = tuple(SampledToken(one.request_id, None if one.sampling is None else 0) for one in requests)
        self.now_s += self._overhead_s + plan.num_tokens / self._tokens_per_s
        for event in self.scheduler.apply(plan, StepResult(1, self._num_steps, tokens)):
            ask, ticket = self._open[event.request_id]
            is_first = event.num_cached_tokens is not None
            cost = token_cost(ask.num_prompt if is_first else 0, 0, len(event.token_ids))
            self.outcome.served[ask.tenant] += cost
            self.outcome.served_beside[ask.tenant] += cost if self._both_wait else 0.0
            if is_first:
                self._num_without_token[ask.tenant] -= 1
                self.outcome.ttft_s[ask.tenant].append(self.now_s - ask.arrival_s)
            if event.finish_reason is not None:
                del self._open[event.request_id]
                self._admission.release(ticket, ask.cost)
        self._num_steps += 1

    def _compare(self) -> None:
        served = self.outcome.served
        difference = served[CALM] - served[FLOOD]
        self._both_wait = all(self._num_without_token.values())
        if not self._both_wait:
            self._least = self._most = difference
        self._least, self._most = min(self._least, difference), max(self._most, difference)
        self.outcome.largest_difference = max(self.outcome.largest_difference, self._most - self._least)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the 50th and the 99th."""
    found = quantiles(values, n=100, method="inclusive")
    return found[49], found[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calm", type=Path)
    parser.add_argument("flood", type=Path)
    parser.add_argument("--flood-speed", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kv-blocks", type=int, default=8192, help="of 16 tokens")
    parser.add_argument("--tokens-per-s", type=float, default=50_000.0)
    parser.add_argument("--overhead-ms", type=float, default=10.0, help="of a step")
    options = parser.parse_args()
    two = {CALM: "calm", FLOOD: "flood"}

    def run(names: dict[int, str], *asks: list[Ask], weights: dict[int, int] = EVEN) -> Outcome:
        return Simulation(options, names, weights).run([ask for each in asks for ask in each], options.seconds)
    calm = read_trace(options.calm, CALM, 1.0, options.seconds)
    flood = read_trace(options.flood, FLOOD, options.flood_speed, options.seconds)
    fast = read_trace(options.calm, CALM, options.flood_speed, options.seconds)
    outcomes = {"alone": run(two, calm), "beside a flood": run(two, calm, flood),
                "as one tenant": run({CALM: "all", FLOOD: "all"}, calm, flood)}
    chunk_s = (options.overhead_ms / 1e3) + SchedulerConfig().max_batch_tokens / options.tokens_per_s
    alone_p50, alone_p99 = percentiles(outcomes["alone"].ttft_s[CALM])
    print("| calm tenant | requests | refused | flood refused | TTFT p50 | p99 | over alone |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name, outcome in outcomes.items():
        p50, p99 = percentiles(outcome.ttft_s[CALM])
        results[name] = {"num_requests": len(outcome.ttft_s[CALM]), "num_refused": outcome.num_refused[CALM],
                         "num_flood_refused": outcome.num_refused[FLOOD], "p50_s": p50, "p99_s": p99}
        print(f"| {name} | {len(outcome.ttft_s[CALM])} | {outcome.num_refused[CALM]} | {outcome.num_refused[FLOOD]} "
              f"| {p50 * 1e3:.0f} ms | {p99 * 1e3:.0f} ms | {p50 / alone_p50:.2f}, {p99 / alone_p99:.2f} x |")
    both = run(two, fast, flood)
    beside = run(two, fast, flood, weights={CALM: WEIGHT, FLOOD: 1}).served_beside
    ratio = beside[CALM] / max(1.0, beside[FLOOD])
    longest = max(ask.num_prompt for ask in (*fast, *flood))
    bound = 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * options.kv_blocks * SchedulerConfig().block_size,
                    MAX_CREDIT)
    print(f"\np99 allowed: {(1.25 * alone_p99 + chunk_s) * 1e3:.0f} ms (1.25 x alone, and one chunk of "
          f"{chunk_s * 1e3:.0f} ms)\nboth flood: largest difference of what they were served while both wait "
          f"{both.largest_difference:,.0f}, bound of VTC {bound:,.0f}\nwith weights {WEIGHT} and 1: while both wait "
          f"the first is served {ratio:.2f} times as much as the other")
    print(json.dumps({"benchmark": "fairness", **describe(), "results": results, "chunk_s": chunk_s,
                      "p99_allowed_s": 1.25 * alone_p99 + chunk_s, "served_when_both_flood": list(both.served.values()),
                      "largest_difference": both.largest_difference, "bound": bound,
                      "weights": [WEIGHT, 1], "served_ratio_by_weights": ratio}))


if __name__ == "__main__":
    main()
