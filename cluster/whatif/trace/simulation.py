"""The requests of a trace on a fleet whose size changes: step after step, on a clock of its own. Pure.

Simplified: prompts are computed in the order of arrival, no prefix is cached, a change of the group's members costs no
pause, and who leaves hands over at once; it is paid for LEAVE_S more. Everything else is timed as the planner times it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.autoscaler.fleet import Counts, Work
from cluster.whatif.trace.fleet_model import FleetModel
from cluster.whatif.trace.scalers import Scaler
from cluster.whatif.trace.trace_file import TracedRequest
from serving.engine.prefill_budget import SLO_PART

DECIDE_S = 0.5              # between two decisions
LEAVE_S = 1.0               # in which a replica that leaves is still paid
LATE_S = 600.0              # after the last arrival nothing is awaited any more
_LEAST_CHUNK = 16           # tokens of prompts in a step, however many sequences decode


@dataclass(eq=False, slots=True)
class Served:
    """One request; None: not yet."""

    request: TracedRequest
    num_left: int               # tokens of its prompt that are to be computed
    first_s: float | None = None
    end_s: float | None = None

    @property
    def ttft_s(self) -> float:
        return math.inf if self.first_s is None else self.first_s - self.request.at_s

    @property
    def itl_s(self) -> float:
        """Return the mean time of a token after the first."""
        if self.first_s is None or self.end_s is None:
            return math.inf
        return (self.end_s - self.first_s) / max(1, self.request.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    wanted: Counts
    ready: Counts
    work: Work


@dataclass
class Run:
    """What came of a simulation."""

    served: list[Served]
    samples: list[Sample] = field(default_factory=list)
    replica_seconds: float = 0.0
    cost: float = 0.0

    def attained(self, ttft_slo_s: float, itl_slo_s: float) -> float:
        """Return the part of the requests that were served within both."""
        return sum(one.ttft_s <= ttft_slo_s and one.itl_s <= itl_slo_s for one in self.served) / len(self.served)

    def pay(self, replica_seconds: float, cost_per_hour: float) -> None:
        self.replica_seconds += replica_seconds
        self.cost += replica_seconds * cost_per_hour / 3600


class _Requests:
    """The requests that have arrived: who waits, who decodes, who has ended."""

    def __init__(self, served: list[Served]) -> None:
        self._coming = deque(served)
        self.waiting: deque[Served] = deque()
        self.decoding: list[tuple[int, int, Served]] = []       # heap: number of the last step, order, request
        self.num_steps = 0
        self.num_ended = 0
        self._num_ended_tokens = 0
        self._num_kv = 0            # of sequences that were begun, with their whole outputs
        self._num_waiting_tokens = self._num_arrived = self._num_prompt_tokens = self._num_output_tokens = 0

    @property
    def next_arrival_s(self) -> float:
        return self._coming[0].request.at_s if self._coming else math.inf

    def arrive(self, now_s: float) -> None:
        """Take in who has come; outputs are expected to be as long as those that have ended."""
        expected = self._num_ended_tokens // max(1, self.num_ended)
        while self.next_arrival_s <= now_s:
            one = self._coming.popleft()
            self.waiting.append(one)
            self._num_arrived += 1
            self._num_waiting_tokens += one.num_left
            self._num_prompt_tokens += one.num_left
            self._num_output_tokens += expected

    def work(self) -> Work:
        return Work(len(self.waiting) + len(self.decoding), self._num_waiting_tokens, len(self.decoding),
                    self._num_kv + self._num_waiting_tokens, self._num_arrived, self._num_prompt_tokens,
                    self._num_output_tokens)

    def take_prompts(self, num_tokens: int, kv_room: float, max_running: int) -> tuple[int, list[Served]]:
        """Compute so many tokens of the prompts that wait. Return how many it were, and whose prompt is done."""
        left = num_tokens
        done: list[Served] = []
        while left and self.waiting and len(self.decoding) + len(done) < max_running:
            one = self.waiting[0]
            if one.num_left == one.request.num_prompt_tokens:       # it has yet to begin
                if self._num_kv and self._num_kv + _kv_tokens(one) > kv_room:
                    break
                self._num_kv += _kv_tokens(one)
            computed = min(left, one.num_left)
            one.num_left -= computed
            left -= computed
            if not one.num_left:
                done.append(self.waiting.popleft())
        self._num_waiting_tokens -= num_tokens - left
        return num_tokens - left, done

    def step(self, num: int, now_s: float, done: list[Served]) -> None:
        """Go on by so many steps, the last of which ends now; prompts that are done get their first token."""
        self.num_steps += num
        for one in done:
            one.first_s = now_s
            last = self.num_steps + one.request.num_output_tokens - 1
            heapq.heappush(self.decoding, (last, id(one), one))
        while self.decoding and self.decoding[0][0] <= self.num_steps:
            one = heapq.heappop(self.decoding)[2]
            one.end_s = now_s
            self._num_kv -= _kv_tokens(one)
            self._num_ended_tokens += one.request.num_output_tokens
            self.num_ended += 1


class Simulation:
    """Use it once: `Simulation(...).run()`."""

    def __init__(self, trace: Sequence[TracedRequest], model: FleetModel, scaler: Scaler, start: Counts) -> None:
        self._model = model
        self._scaler = scaler
        self._run = Run([Served(request, request.num_prompt_tokens) for request in trace])
        self._requests = _Requests(self._run.served)
        self._starting: list[tuple[float, int]] = []            # heap: when it is ready, index of the pool
        self._wanted = self._ready = start
        self._now_s = self._next_decision_s = self._paid_until_s = 0.0

    def run(self) -> Run:
        until_s = self._run.served[-1].request.at_s + LATE_S
        while self._requests.num_ended < len(self._run.served) and self._now_s < until_s:
            self._requests.arrive(self._now_s)
            self._become_ready()
            if self._now_s >= self._next_decision_s:
                self._decide()
            has_work = self._requests.waiting or self._requests.decoding
            if not (has_work and self._model.holds(self._ready) and self._step()):
                self._now_s = max(self._now_s, self._next_event_s())
        self._pay()
        return self._run

    def _step(self) -> bool:
        """Run the next step, or as many alike as there are before anything happens. False: nobody can go on."""
        requests, ready = self._requests, self._ready
        num_decoding, num_members = len(requests.decoding), sum(ready)
        budget = min(num_members * self._model.max_batch_tokens,
                     int(self._model.rows_within(ready, SLO_PART * self._model.rules.itl_slo_s)))
        num_prompt_tokens, done = requests.take_prompts(
            max(_LEAST_CHUNK, budget - num_decoding), self._model.kv_room(ready), num_members * self._model.max_running)
        if not num_prompt_tokens and not num_decoding:
            return False
        step_s, num = self._model.step_s(ready, num_decoding + num_prompt_tokens), 1
        if not num_prompt_tokens:
            until_end = requests.decoding[0][0] - requests.num_steps
            num = max(1, min(until_end, math.ceil((self._next_event_s() - self._now_s) / step_s)))
        self._now_s += num * step_s
        requests.step(num, self._now_s, done)
        return True

    def _next_event_s(self) -> float:
        starting_s = self._starting[0][0] if self._starting else math.inf
        return min(self._next_decision_s, self._requests.next_arrival_s, starting_s)

    def _become_ready(self) -> None:
        while self._starting and self._starting[0][0] <= self._now_s:
            index = heapq.heappop(self._starting)[1]
            self._ready = tuple(count + (at == index) for at, count in enumerate(self._ready))

    def _decide(self) -> None:
        self._next_decision_s = self._now_s + DECIDE_S
        self._pay()
        work = self._requests.work()
        wanted = self._scaler.wanted(self._now_s, self._wanted, self._ready, work)
        for index, (before, after) in enumerate(zip(self._wanted, wanted, strict=True)):
            self._change(index, after - before)
        self._wanted = wanted
        self._run.samples.append(Sample(self._now_s, wanted, self._ready, work))

    def _change(self, index: int, num_more: int) -> None:
        """Start so many replicas of a pool, or let so many go: first those that have yet to be ready."""
        pool = self._model.pools[index]
        for _ in range(num_more):
            heapq.heappush(self._starting, (self._now_s + pool.ready_s, index))
        for _ in range(-num_more):
            if starting := [one for one in self._starting if one[1] == index]:
                self._starting.remove(max(starting))
                heapq.heapify(self._starting)
            else:
                self._ready = tuple(count - (at == index) for at, count in enumerate(self._ready))
                self._run.pay(LEAVE_S, pool.cost_per_hour)

    def _pay(self) -> None:
        """Pay for what was wanted up to now, ready or not."""
        elapsed_s, self._paid_until_s = self._now_s - self._paid_until_s, self._now_s
        for pool, count in zip(self._model.pools, self._wanted, strict=True):
            self._run.pay(count * elapsed_s, pool.cost_per_hour)


def _kv_tokens(one: Served) -> int:
    return one.request.num_prompt_tokens + one.request.num_output_tokens
