"""Disturbs a group at random for minutes while streams go on: whether any failed, was wrong, or left a trace.

Real coordinator, shards and two routers of a local group, without Ray (benchmarks/local_group). Every --every seconds
one of: a member is killed and started again; stopped and continued; told to end, or drained by an order and then ended,
and started again; a node more joins, or goes; the coordinator is killed and started again; a router is, whose clients
ask again elsewhere. Every answer is compared with that of an undisturbed run. At the end, with as many members as at
first and nobody who asks: no sequence, block, process, file descriptor or shared memory is left over, and no process
has grown.
Goodput is tokens/s over those of undisturbed groups of as many members as were there at each moment.
Exits with 1 when anything of that is not so. The last line of stdout is one JSON object.

  python benchmarks/chaos.py --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.local_group.faults import Faults  # noqa: E402
from benchmarks.local_group.footprint import Footprint  # noqa: E402
from benchmarks.local_group.group import LocalGroup, LocalGroupError  # noqa: E402
from benchmarks.local_group.leaks import growth, until_idle  # noqa: E402
from benchmarks.local_group.pauses import distribution_ms, num_tokens_between  # noqa: E402
from benchmarks.local_group.setup import (  # noqa: E402
    Load,
    add_options,
    new_streams,
    new_trial,
    run_benchmark,
    running_group,
)
from benchmarks.local_group.streams import Streams  # noqa: E402
from benchmarks.machine import describe  # noqa: E402

KINDS = ["kill", "stop", "end", "drain", "join", "leave", "coordinator", "router"]
NUM_ROUTERS = 2
GOODPUT_BOUND = 0.9
WAIT_S = 90.0
_LOOK_S = 0.1               # also how much before a fault the latest token of a gap may have come


@dataclass
class Disturbed:
    """What was done to a group, and what could be seen of it."""

    num_of_kind: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    at_s: list[tuple[float, str]] = field(default_factory=list)         # when each kind of fault began
    possible_tokens: float = 0.0        # of undisturbed groups of as many members, over the same time
    tokens: int = 0
    faults: list[str] = field(default_factory=list)     # that did not end as they should


class Chaos:
    """Draws faults. `rates`: tokens/s that an undisturbed group makes, by the number of its members."""

    def __init__(self, group: LocalGroup, streams: Streams, draw: random.Random, options: argparse.Namespace) -> None:
        self.found = Disturbed()
        self.rates: dict[int, float] = {}
        self._group = group
        self._streams = streams
        self._draw = draw
        self._kinds: list[str] = options.kinds
        self._left: list[str] = []          # of the kinds, in this round
        self._every_s: float = options.every
        self._members: int = options.members
        self._faults = Faults(group, draw)

    async def measure_rates(self, seconds: float) -> None:
        """Let the streams go on undisturbed; with one member more, then one fewer, when members may come and go."""
        await self._measure_rate(seconds)
        if "join" in self._kinds:
            await self._faults.join()
            await self._group.until_serving(timeout_s=WAIT_S)
            await self._measure_rate(seconds)
            await self._faults.leave()
            await self._group.until_serving(timeout_s=WAIT_S)

    async def run(self, seconds: float) -> None:
        """Disturb for so long, then wait until all is as at first."""
        counting, until_s = asyncio.create_task(self._count_possible()), time.monotonic() + seconds
        running: list[asyncio.Task[None]] = []
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            kind = self._next_kind()
            if kind is not None:
                self.found.num_of_kind[kind] += 1
                self.found.at_s.append((began_s, kind))
                running.append(self._faults.start(kind))
            await asyncio.sleep(self._every_s)
            self._streams.outcome.forget_before(began_s)
            self._tell(kind or "nothing")
        counting.cancel()
        self.found.faults += [repr(error) for error in await asyncio.gather(*running, return_exceptions=True)
                              if error is not None]
        await self._faults.leave()
        await self._group.until_serving(timeout_s=WAIT_S)

    def _next_kind(self) -> str | None:
        """Draw a fault that may happen now, if any. Each of them comes once before any comes again."""
        left = self._faults.possible(self._left)
        if not left:
            self._left = list(self._kinds)
            left = self._faults.possible(self._left)
        if not left:
            return None
        kind = self._draw.choice(left)
        self._left.remove(kind)
        return kind

    async def _measure_rate(self, seconds: float) -> None:
        await asyncio.sleep(1.0)
        began_s = time.monotonic()
        await asyncio.sleep(seconds)
        num = num_tokens_between(self._streams.outcome.arrivals, began_s, time.monotonic())
        self.rates[len(self._faults.present())] = num / (time.monotonic() - began_s)

    def longest_gaps_s(self) -> dict[str, list[float]]:
        """Return the longest gap of any stream that began between each fault and the next, by the fault's kind."""
        found: dict[str, list[float]] = defaultdict(list)
        ends_s = [at_s for at_s, _ in self.found.at_s[1:]] + [float("inf")]
        for (began_s, kind), end_s in zip(self.found.at_s, ends_s, strict=False):
            gaps = [seconds for at_s, seconds in self._streams.outcome.long_gaps
                    if began_s - _LOOK_S <= at_s < end_s - _LOOK_S and at_s + seconds > began_s]
            found[kind].append(max(gaps, default=0.0))
        return found

    def _tell(self, kind: str) -> None:
        outcome = self._streams.outcome
        print(f"{kind:12} answers {outcome.num_answers}, failed {len(outcome.failed)}, wrong {len(outcome.wrong)}",
              file=sys.stderr, flush=True)

    async def _count_possible(self) -> None:
        """Add up what the members that run could do, and what came."""
        first, last_s = self._streams.outcome.num_tokens, time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            num_serving = min(await self._faults.num_serving() or self._members, self._members)
            nearest = min(self.rates, key=lambda num: abs(num - num_serving))
            now_s = time.monotonic()
            self.found.possible_tokens += (now_s - last_s) * self.rates[nearest] * min(1.0, num_serving / nearest)
            last_s = now_s
            self.found.tokens = self._streams.outcome.num_tokens - first


async def measure(options: argparse.Namespace, load: Load, seed: int, folder: Path) -> dict[str, object]:
    """Return what the last line says."""
    async with running_group(options, load, folder, NUM_ROUTERS) as group:
        trial = await new_trial(group, load, seed)
        await until_idle(group)
        before = group.footprints()
        streams = new_streams(group, trial)
        chaos = Chaos(group, streams, random.Random(seed), options)
        streams.start()
        broken, left = await disturb(chaos, group, streams, options, before)
    found, goodput = chaos.found, chaos.found.tokens / max(1.0, chaos.found.possible_tokens)
    return {"seed": seed, "broken": broken, **streams.outcome.verdict, "faults": dict(found.num_of_kind),
            "faults_that_failed": found.faults, "goodput": round(goodput, 3),
            "undisturbed_tokens_per_s": {num: round(rate) for num, rate in chaos.rates.items()},
            "longest_gap_ms": {kind: distribution_ms(gaps) for kind, gaps in chaos.longest_gaps_s().items()},
            "left_over": left, "leaked_processes": group.leaked()}


async def disturb(chaos: Chaos, group: LocalGroup, streams: Streams, options: argparse.Namespace,
                  before: dict[str, Footprint]) -> tuple[str, list[str]]:
    """Return why it was given up, "" when it was not, and what was left over at the end."""
    try:
        await chaos.measure_rates(options.calm_s)
        await chaos.run(60.0 * options.minutes)
        await streams.finish()
        await until_idle(group)
    except LocalGroupError as error:
        await streams.cancel()
        print(error, file=sys.stderr)
        return str(error).partition("\n")[0], []
    return "", growth(before, group.footprints(), group.config.pools[0].kv_cache or 0)


def is_right(found: dict[str, object]) -> bool:
    """Return whether nothing failed, was wrong or was left over; goodput is for who has the machine alone."""
    return not any(found[name] for name in ("broken", "failed", "wrong", "faults_that_failed", "left_over",
                                            "leaked_processes"))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS, help=f"of {','.join(KINDS)}")
    parser.add_argument("--calm-s", type=float, default=10.0, help="seconds without faults, for the rate of each size")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    found = run_benchmark(options, measure)
    print(f"goodput {found['goodput']}, bound {GOODPUT_BOUND}")
    print(json.dumps({"benchmark": "chaos", "model": options.model, "members": options.members,
                      "copies": options.copies, "minutes": options.minutes, **found, "machine": describe()}))
    sys.exit(0 if is_right(found) else 1)


if __name__ == "__main__":
    main()
