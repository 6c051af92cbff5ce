"""Clients of a local group that stream the same questions again and again, and compare every token with what an
undisturbed run gave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from benchmarks.local_group.questions import Answer, Question, first_difference
from serving.link.channel_options import DIRECT
from serving.proto import inference_pb2_grpc

_TIMEOUT_S = 600.0
STALLED_S = 240.0           # a stream to which nothing comes for so long has failed
_RETRY_S = 0.05
_LONG_S = 0.02              # gaps below are of no interest
_LOST_ROUTER = (grpc.StatusCode.UNAVAILABLE,)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message of a stream with tokens."""

    at_s: float
    request_id: str
    num_tokens: int             # in it
    num_before: int             # of the same request, before it


@dataclass
class Outcome:
    """All that happened to the streams. `arrivals` are in the order of time."""

    arrivals: list[Arrival] = field(default_factory=list)
    long_gaps: list[tuple[float, float]] = field(default_factory=list)      # when one began, and its seconds
    num_answers: int = 0        # complete and compared
    num_tokens: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)        # requests of a router that was killed

    def forget_before(self, at_s: float) -> None:
        """Drop arrivals that nobody will look at: there are thousands a second."""
        self.arrivals = [arrival for arrival in self.arrivals if arrival.at_s >= at_s]

    @property
    def verdict(self) -> dict[str, object]:
        return {"answers": self.num_answers, "tokens": self.num_tokens, "failed": len(self.failed),
                "wrong": len(self.wrong), "retried": len(self.retried),
                "reasons": sorted(set(reason.partition(": ")[2] for reason in self.failed))[:5],
                "wrong_first": self.wrong[:5]}


class Streams:
    """One endless stream for each question, each at one of the routers. `addresses` is asked before every request; a
    router whose name `is_lost` accepts was killed: its requests are asked again elsewhere."""

    def __init__(self, model: str, questions: Sequence[Question], expected: Sequence[Answer],
                 addresses: Callable[[], Awaitable[dict[str, str]]], is_lost: Callable[[str], bool]) -> None:
        self.outcome = Outcome()
        self.questions: dict[str, Question] = {}    # by request id, all that there were
        self.open: set[str] = set()                 # request ids
        self._asked_s: dict[str, float] = {}        # when each request was
        self._latest_s: dict[str, float] = {}       # of each request's arrivals
        self._model = model
        self._asked = questions
        self._expected = expected
        self._addresses = addresses
        self._is_lost = is_lost
        self._channels: dict[str, grpc.aio.Channel] = {}        # by address
        self._is_ending = False
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._repeat(question)) for question in self._asked]

    async def arrival(self) -> None:
        """Return at the next message of any stream."""
        await self._arrived.wait()

    async def finish(self) -> None:
        """Let what is open come to its end; a stream that stands still for STALLED_S has failed."""
        self._is_ending = True
        while True:
            _, late = await asyncio.wait(self._tasks, timeout=1.0)
            stalled_s = time.monotonic() - STALLED_S
            stalled = [request_id for request_id in self.open
                       if max(self._latest_s.get(request_id, 0.0), self._asked_s[request_id]) < stalled_s]
            if not late or stalled:
                break
        self.outcome.failed += [f"{request_id}: nothing came for {STALLED_S:.0f} s" for request_id in stalled]
        await self._close(late)

    async def cancel(self) -> None:
        """Break off all that is open."""
        await self._close(self._tasks)

    async def _close(self, tasks: Sequence[asyncio.Task[None]] | set[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    async def _repeat(self, question: Question) -> None:
        turn = 0
        while not self._is_ending:
            routers = sorted((await self._addresses()).items())
            if not routers:
                await asyncio.sleep(_RETRY_S)
                continue
            name, address = routers[question.number % len(routers)]
            request_id = f"q{question.number}.{turn}"
            turn += 1
            self.questions[request_id] = question
            self._asked_s[request_id] = time.monotonic()
            self.open.add(request_id)
            try:
                await self._ask(question, request_id, address)
            except grpc.aio.AioRpcError as error:
                if self._is_lost(name) and error.code() in _LOST_ROUTER:
                    self.outcome.retried.append(request_id)
                    await asyncio.sleep(_RETRY_S)
                else:
                    self.outcome.failed.append(f"{request_id}: {error.code().name} {error.details()}")
                    await asyncio.sleep(10 * _RETRY_S)      # what is broken is not asked in a tight loop
            finally:
                self.open.discard(request_id)
                self._latest_s.pop(request_id, None)

    async def _ask(self, question: Question, request_id: str, address: str) -> None:
        answer, expected = Answer(), self._expected[question.number]
        async for message in self._stub(address).Generate(question.request(self._model, request_id),
                                                          timeout=_TIMEOUT_S):
            if message.token_ids:
                self._note(request_id, len(message.token_ids), len(answer.token_ids))
            answer.add(message)
        self.outcome.num_answers += 1
        if answer.digest != expected.digest:
            at = first_difference(expected.token_ids, answer.token_ids)
            what = "other text or log-probabilities" if at is None else f"another token at {at}"
            self.outcome.wrong.append(
                f"{request_id}: {what}; {len(answer.token_ids)} of {len(expected.token_ids)} tokens")

    def _note(self, request_id: str, num_tokens: int, num_before: int) -> None:
        now_s = time.monotonic()
        before_s = self._latest_s.get(request_id, now_s)
        if now_s - before_s > _LONG_S:
            self.outcome.long_gaps.append((before_s, now_s - before_s))
        self._latest_s[request_id] = now_s
        self.outcome.num_tokens += num_tokens
        self.outcome.arrivals.append(Arrival(now_s, request_id, num_tokens, num_before))
        self._arrived.set()
        self._arrived = asyncio.Event()

    def _stub(self, address: str) -> inference_pb2_grpc.InferenceStub:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=DIRECT)
        return inference_pb2_grpc.InferenceStub(self._channels[address])


async def answers_of(model: str, questions: Sequence[Question], address: str) -> list[Answer]:
    """Ask each question once, all at the same time."""
    async with grpc.aio.insecure_channel(address, options=DIRECT) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def ask(question: Question) -> Answer:
            answer = Answer()
            async for message in stub.Generate(question.request(model, f"first{question.number}"), timeout=_TIMEOUT_S):
                answer.add(message)
            return answer
        return list(await asyncio.gather(*map(ask, questions)))
