"""Has members of a group leave on purpose, with long contexts on them: KV blocks sent beside computed again.

Real coordinator, shards and router of a local group, without Ray (benchmarks/local_group). Each round asks new prompts,
tells the member with most streams to end (SIGTERM) when all have begun, and starts another in its place. Rounds take
turns: in one the new members choose by measured rates, in the next they compute everything again. Of each: when the
last sequence had left the member, when its process had ended, and the longest pause of a stream beyond a median step.
All answers are compared with those of the group afterwards, undisturbed. Exits with 1 when one failed or was wrong.
The last line of stdout is one JSON object.

  python benchmarks/drain.py --rounds 6 --shortest 2000 --longest 6000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpc  # noqa: E402

from benchmarks.local_group.group import LocalGroup, LocalProcess  # noqa: E402
from benchmarks.local_group.pauses import distribution_ms, longest_gaps, median_step  # noqa: E402
from benchmarks.local_group.questions import FIRST_TOKEN_ID, Answer, Question  # noqa: E402
from benchmarks.local_group.setup import Load, add_options, run_benchmark, running_group  # noqa: E402
from benchmarks.local_group.streams import Arrival, answers_of  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from model.args import read_model_args  # noqa: E402
from serving.link.channel_options import DIRECT  # noqa: E402
from serving.proto import inference_pb2_grpc  # noqa: E402

WAYS = ("chosen", "computed")       # rounds take turns
WARM_TOKENS = 20                    # of every stream, before a member is told to end
LOOK_S = 0.02
WAIT_S = 180.0


@dataclass
class Round:
    """One member that left. Pauses are seconds beyond a step, by request id."""

    way: str
    num_moved: int                  # streams that were on it
    step_s: float
    emptied_s: float = 0.0
    ended_s: float = 0.0
    moved: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)      # sequences moved, as the router counts them
    num_wrong: int = 0


class Asked:
    """Streams of one round, each asked once."""

    def __init__(self, questions: list[Question], name: str) -> None:
        self.questions = questions
        self.arrivals: list[Arrival] = []
        self.answers = [Answer() for _ in questions]
        self.name = name

    async def run(self, model: str, address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=DIRECT) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            await asyncio.gather(*(self._ask(stub, model, question) for question in self.questions))

    async def _ask(self, stub: inference_pb2_grpc.InferenceStub, model: str, question: Question) -> None:
        answer, request_id = self.answers[question.number], f"{self.name}.{question.number}"
        async for message in stub.Generate(question.request(model, request_id), timeout=WAIT_S):
            if message.token_ids:
                self.arrivals.append(Arrival(time.monotonic(), request_id, len(message.token_ids),
                                             len(answer.token_ids)))
            answer.add(message)

    @property
    def have_begun(self) -> bool:
        return all(len(answer.token_ids) >= WARM_TOKENS for answer in self.answers)


class Drains:
    def __init__(self, group: LocalGroup, options: argparse.Namespace, vocab_size: int, seed: int) -> None:
        self._group = group
        self._options = options
        self._vocab_size = vocab_size
        self._draw = random.Random(seed)
        self._counted: dict[str, int] = {}

    async def run(self, number: int) -> Round:
        group, asked = self._group, Asked(self._questions(), f"r{number}")
        way = WAYS[number % len(WAYS)]
        computes = group.folder / "computes"        # see roles.py
        (computes.touch if way == "computed" else lambda: computes.unlink(missing_ok=True))()
        await group.until_serving(timeout_s=WAIT_S)
        address = next(iter((await group.router_addresses()).values()))
        streams = asyncio.create_task(asked.run(group.config.model.served_name, address))
        while not asked.have_begun and not streams.done():      # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        found = await self._drain(way, asked)
        await streams
        found.ways = await self._newly_moved()
        group.start_shard(f"n{number + self._options.members}")
        await group.until_serving(timeout_s=WAIT_S)
        right = await answers_of(group.config.model.served_name, asked.questions, address)
        found.num_wrong = sum(answer.digest != other.digest
                              for answer, other in zip(asked.answers, right, strict=True))
        return found

    async def _drain(self, way: str, asked: Asked) -> Round:
        owners = await self._group.shards_of_requests()
        placed = list(owners.values())
        victim = max(self._group.alive("shard"), key=lambda shard: placed.count(shard.name))
        began_s = time.monotonic()
        found = Round(way, placed.count(victim.name), median_step(asked.arrivals, began_s - 5.0, began_s))
        victim.tell_to_end()
        while victim.name in (await self._group.shards_of_requests()).values():     # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        found.emptied_s = time.monotonic() - began_s
        await victim.until_ended()
        found.ended_s = time.monotonic() - began_s
        await asyncio.sleep(10 * found.step_s)
        self._note_pauses(found, asked, owners, victim, began_s)
        return found

    def _note_pauses(self, found: Round, asked: Asked, owners: dict[str, str], victim: LocalProcess,
                     began_s: float) -> None:
        for request_id, gap in longest_gaps(asked.arrivals, began_s, time.monotonic()).items():
            pauses = found.moved if owners.get(request_id) == victim.name else found.others
            pauses[request_id] = max(0.0, gap.seconds - found.step_s)

    def _questions(self) -> list[Question]:
        draw, options = self._draw, self._options
        return [Question(number, tuple(draw.choices(range(FIRST_TOKEN_ID, self._vocab_size),
                                                    k=draw.randint(options.shortest, options.longest))),
                         options.max_tokens, {"temperature": 0.0}) for number in range(options.streams)]

    async def _newly_moved(self) -> dict[str, int]:
        moved = await self._group.sequences_moved()
        new = {way: num - self._counted.get(way, 0) for way, num in moved.items()}
        self._counted = moved
        return {way: num for way, num in new.items() if num}


def figures(rounds: list[Round]) -> dict[str, object]:
    """Return what was found of each way, in milliseconds and seconds."""
    found: dict[str, object] = {}
    for way in WAYS:
        of_way = [one for one in rounds if one.way == way]
        if not of_way:
            continue
        ways: dict[str, int] = {}
        for one in of_way:
            for name, num in one.ways.items():
                ways[name] = ways.get(name, 0) + num
        found[way] = {
            "drains": len(of_way), "streams_moved": sum(one.num_moved for one in of_way), "ways": ways,
            "emptied_s": [round(one.emptied_s, 2) for one in of_way],
            "ended_s": [round(one.ended_s, 2) for one in of_way],
            "moved_ms": distribution_ms([pause for one in of_way for pause in one.moved.values()]),
            "others_ms": distribution_ms([pause for one in of_way for pause in one.others.values()]),
            "step_ms": round(1e3 * statistics.median(one.step_s for one in of_way), 1)}
    return found


async def measure(options: argparse.Namespace, _: Load, seed: int, folder: Path) -> dict[str, object]:
    """Return what the last line says."""
    load = Load(2 * options.streams, 0, options.longest, (0, options.max_tokens))
    rounds = []
    async with running_group(options, load, folder) as group:
        args = read_model_args(Path(group.config.model.path))
        drains = Drains(group, options, args.vocab_size, seed)
        for number in range(options.rounds):
            rounds.append(await drains.run(number))
            print(f"round {number}: {rounds[-1]}", file=sys.stderr, flush=True)
    return {"seed": seed, "wrong": sum(one.num_wrong for one in rounds), **figures(rounds),
            "leaked_processes": group.leaked()}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--shortest", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--longest", type=int, default=6000)
    parser.add_argument("--max-tokens", type=int, default=500)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    found = run_benchmark(options, measure)
    print(json.dumps({"benchmark": "drain", "model": options.model, "members": options.members,
                      "streams": options.streams, "prompts": [options.shortest, options.longest], **found,
                      "machine": describe()}))
    sys.exit(1 if found["wrong"] or found["leaked_processes"] else 0)


if __name__ == "__main__":
    main()
