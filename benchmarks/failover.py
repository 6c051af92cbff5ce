"""Kills members of a group at random tokens and layers: how long streams stand still, and whether any is wrong.

Real coordinator, shards and router of a local group, without Ray (benchmarks/local_group). 32 greedy and 8 sampled
streams of mixed contexts go on without an end; every answer is compared, token ids, text and log-probabilities, with
that of an undisturbed run. Half a second after a kill a replacement starts on the dead member's node, and the next
kill comes when it has joined. A pause is the time between two messages of a stream around the kill less a median step;
the streams of the dead member are known from the router. Bounds: see BOUNDS and docs/architecture.md.
Exits with 1 when a stream has failed or was wrong. The last line of stdout is one JSON object.

  python benchmarks/failover.py --kills 200 --members 3 --copies 2 --picture failover.png
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.local_group.group import WAIT_S, LocalGroup, LocalGroupError, LocalProcess  # noqa: E402
from benchmarks.local_group.pauses import (  # noqa: E402
    Gap,
    distribution_ms,
    gaps_between,
    longest_gaps,
    median_step,
)
from benchmarks.local_group.picture import draw_tokens  # noqa: E402
from benchmarks.local_group.setup import (  # noqa: E402
    Load,
    add_options,
    new_streams,
    new_trial,
    prefill_rate,
    read_rate,
    run_benchmark,
    running_group,
)
from benchmarks.local_group.streams import Streams  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from model.args import read_model_args  # noqa: E402
from model.memory import expert_bytes  # noqa: E402
from serving.link.epoch import Epoch  # noqa: E402

BOUNDS = {"survivors_ms": "copies: p50 100, p99 250", "survivors_beyond_reading_ms": "no copies: max 400",
          "dead_beyond_prefill_ms": "copies: max 250, one sequence at a time",
          "dead_beyond_all_prefill_ms": "copies: max 250, all of the dead member's together", "joined_ms": "max 100"}
PREFILL_FACTOR = 1.25       # of the time to compute a sequence again, that a pause may have
WARM_S = 1.0                # of steps before a kill
STEPS_S = 5.0               # before a kill, from which the median step is taken
REPLACED_AFTER_S = 0.5
_CAUGHT_S = 0.3             # a message that was on its way at a kill may come so much later, on a busy machine


@dataclass
class Kill:
    """One kill and what came of it. Pauses are seconds beyond a step, by request id."""

    victim: str
    at_s: float
    step_s: float
    of_dead: dict[str, float] = field(default_factory=dict)
    of_survivors: dict[str, float] = field(default_factory=dict)
    joined: dict[str, float] = field(default_factory=dict)      # while the replacement was taken in
    lost_tokens: dict[str, int] = field(default_factory=dict)   # of the dead member's: what is computed again
    missing_bytes: int = 0      # of experts that nobody else held
    num_unresumed: int = 0
    healed_s: float = 0.0


@dataclass(frozen=True)
class Speeds:
    """What bounds are made of, measured before the first kill."""

    prefill_tokens_per_s: float
    read_bytes_per_s: float     # of the checkpoint, from the page cache
    expert_bytes: int


class Failover:
    """Kills one member after the other."""

    def __init__(self, group: LocalGroup, streams: Streams, draw: random.Random, speeds: Speeds) -> None:
        self.kills: list[Kill] = []
        self._group = group
        self._streams = streams
        self._draw = draw
        self._speeds = speeds

    async def kill_one(self) -> Kill:
        """Kill a member at a random moment, replace it, and wait until it has joined. Raises LocalGroupError."""
        group, streams = self._group, self._streams
        victim = self._draw.choice(group.alive("shard"))
        await asyncio.sleep(WARM_S)
        owners, epoch = await group.shards_of_requests(), (await group.status()).view.epoch
        kill = await self._kill(victim)
        self.kills.append(kill)
        kill.missing_bytes = missing_bytes(epoch, victim.name, self._speeds.expert_bytes)
        kill.num_unresumed = len(await self._until_resumed(kill))
        await asyncio.sleep(max(0.0, kill.at_s + REPLACED_AFTER_S - time.monotonic()))
        self._note_pauses(kill, owners)
        began_s = time.monotonic()
        group.start_shard(victim.node)
        await group.until_serving()
        kill.healed_s = time.monotonic() - kill.at_s
        await asyncio.sleep(REPLACED_AFTER_S)
        gaps = longest_gaps(streams.outcome.arrivals, began_s, time.monotonic())
        kill.joined = {request_id: gap.seconds - kill.step_s for request_id, gap in gaps.items()}
        return kill

    async def _kill(self, victim: LocalProcess) -> Kill:
        """Kill it some tokens from now, at a random place in a step."""
        while not (step_s := median_step(self._streams.outcome.arrivals, time.monotonic() - STEPS_S, time.monotonic())):
            await self._streams.arrival()
        for _ in range(self._draw.randrange(1, 8)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WARM_S):
                    await self._streams.arrival()
        await asyncio.sleep(self._draw.random() * step_s)
        victim.kill()
        return Kill(victim.name, time.monotonic(), step_s)

    async def _until_resumed(self, kill: Kill) -> set[str]:
        """Wait until every stream that had begun has gone on or ended, and return those that have not after WAIT_S."""
        arrivals = self._streams.outcome.arrivals
        waiting = {arrival.request_id for arrival in arrivals if arrival.at_s < kill.at_s}
        while waiting and time.monotonic() < kill.at_s + WAIT_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLACED_AFTER_S):
                    await self._streams.arrival()
            caught_s = self._caught_s(kill)
            resumed = {arrival.request_id for arrival in reversed(arrivals) if arrival.at_s > caught_s}
            waiting = (waiting & self._streams.open) - resumed
        return waiting

    def _caught_s(self, kill: Kill) -> float:
        """Return when no message is on its way any more that was sent before the kill."""
        return kill.at_s + max(_CAUGHT_S, 2 * kill.step_s)

    def _gaps_of(self, kill: Kill) -> list[Gap]:
        """Return those that the kill can have made: they begin before it, or with what was on its way then."""
        return gaps_between(self._streams.outcome.arrivals, kill.at_s, self._caught_s(kill))

    def _note_pauses(self, kill: Kill, owners: dict[str, str]) -> None:
        for gap in self._gaps_of(kill):
            if gap.request_id not in owners:
                continue            # began after the router was asked
            pause_s = max(0.0, gap.seconds - kill.step_s)
            pauses = kill.of_dead if owners[gap.request_id] == kill.victim else kill.of_survivors
            if pause_s >= pauses.get(gap.request_id, 0.0):
                pauses[gap.request_id] = pause_s
                if pauses is kill.of_dead:
                    num_prompt = len(self._streams.questions[gap.request_id].prompt)
                    kill.lost_tokens[gap.request_id] = num_prompt + gap.num_tokens


def missing_bytes(epoch: Epoch | None, node_name: str, expert_bytes: int) -> int:
    """Return the bytes of the experts that only the member on that node holds."""
    ranks = [rank for rank, member in enumerate(epoch.members) if member.node_name == node_name] if epoch else []
    if epoch is None or not ranks:
        return 0
    return expert_bytes * sum(holders == (ranks[0],) for layer in epoch.placement.holders for holders in layer)


def figures(kills: list[Kill], speeds: Speeds) -> dict[str, object]:
    """Return the distributions of pauses, in milliseconds."""
    def of(name: str) -> dict[str, float]:
        return distribution_ms([seconds for kill in kills for seconds in getattr(kill, name).values()])
    return {"survivors_ms": of("of_survivors"), "dead_ms": of("of_dead"), "joined_ms": of("joined"),
            "survivors_beyond_reading_ms": distribution_ms([
                seconds - kill.missing_bytes / speeds.read_bytes_per_s
                for kill in kills for seconds in kill.of_survivors.values()]),
            "missing_bytes": statistics.median(kill.missing_bytes for kill in kills) if kills else 0,
            "dead_beyond_prefill_ms": distribution_ms([
                pause_s - PREFILL_FACTOR * kill.lost_tokens[request_id] / speeds.prefill_tokens_per_s
                for kill in kills for request_id, pause_s in kill.of_dead.items()]),
            "dead_beyond_all_prefill_ms": distribution_ms([
                pause_s - PREFILL_FACTOR * sum(kill.lost_tokens.values()) / speeds.prefill_tokens_per_s
                for kill in kills for pause_s in kill.of_dead.values()]),
            "healed_s": round(statistics.median(kill.healed_s for kill in kills), 2) if kills else None,
            "unresumed": sum(kill.num_unresumed for kill in kills)}


def tell(number: int, kill: Kill) -> None:
    def longest(pauses: dict[str, float]) -> str:
        return f"{max(pauses.values(), default=0.0) * 1e3:7.0f} ms of {len(pauses):2}"
    print(f"kill {number}: {kill.victim:8} step {kill.step_s * 1e3:5.1f} ms, longest pause of survivors' streams "
          f"{longest(kill.of_survivors)}, of its own {longest(kill.of_dead)}, at the join {longest(kill.joined)}; "
          f"{kill.missing_bytes / 1e6:.0f} MB missing, whole again after {kill.healed_s:.1f} s",
          file=sys.stderr, flush=True)


async def measure(options: argparse.Namespace, load: Load, seed: int, folder: Path) -> dict[str, object]:
    """Return what the last line says."""
    async with running_group(options, load, folder) as group:
        trial, model = await new_trial(group, load, seed), Path(group.config.model.path)
        args = read_model_args(model)
        speeds = Speeds(await prefill_rate(group, load, seed), read_rate(model), expert_bytes(args, dtype_bytes=2))
        streams = new_streams(group, trial)
        failover = Failover(group, streams, random.Random(seed), speeds)
        streams.start()
        broken = await kill_all(failover, streams, options)
        await (streams.cancel() if broken else streams.finish())
        found = {"seed": seed, "kills": len(failover.kills), "broken": broken, **streams.outcome.verdict,
                 "different_answers": len({answer.digest for answer in trial.expected}),
                 "prefill_tokens_per_s": round(speeds.prefill_tokens_per_s),
                 "read_bytes_per_s": round(speeds.read_bytes_per_s),
                 "step_ms": round(1e3 * statistics.median([kill.step_s for kill in failover.kills] or [0.0]), 2),
                 **figures(failover.kills, speeds)}
    return {**found, "leaked_processes": group.leaked()}


async def kill_all(failover: Failover, streams: Streams, options: argparse.Namespace) -> str:
    """Return why it was given up, "" when it was not."""
    for number in range(options.kills):
        try:
            kill = await failover.kill_one()
        except LocalGroupError as error:
            print(error, file=sys.stderr)
            return str(error).partition("\n")[0]
        tell(number, kill)
        if options.picture and number == options.kills // 2:
            draw_tokens(streams.outcome.arrivals, kill.at_s, kill.of_dead, options.picture)
        streams.outcome.forget_before(time.monotonic() - STEPS_S)
    return ""


def is_right(found: dict[str, object]) -> bool:
    return not any(found[name] for name in ("broken", "failed", "wrong", "unresumed", "leaked_processes"))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--picture", type=Path, help="PNG of the tokens over time around a kill")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    found = run_benchmark(options, measure)
    for name, bound in BOUNDS.items():
        print(f"{name}: {found.get(name)}; bound: {bound}")
    print(json.dumps({"benchmark": "failover", "model": options.model, "members": options.members,
                      "copies": options.copies, **found, "bounds": BOUNDS, "machine": describe()}))
    sys.exit(0 if is_right(found) else 1)


if __name__ == "__main__":
    main()
