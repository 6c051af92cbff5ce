"""Whether members of a group under heavy noise are taken for dead, and what heartbeats cost a group that is idle.

Real coordinator, shards and a router of a local group, without Ray (benchmarks/local_group). First nobody asks, and the
CPU time of each shard's process and of its heartbeats' thread is taken over --idle-s seconds. Then streams go on for
--minutes beside --busy processes that do nothing but compute, and one shard after the other makes a call that holds
Python's lock for LOCK_S. Every change of the group's members is a false one, for all of them live.
Exits with 1 when there was any, or an answer failed or was wrong. The last line of stdout is one JSON object.

  python benchmarks/heartbeats.py --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.local_group.footprint import cpu_seconds  # noqa: E402
from benchmarks.local_group.group import LocalGroup  # noqa: E402
from benchmarks.local_group.leaks import until_idle  # noqa: E402
from benchmarks.local_group.roles import LOCK_S  # noqa: E402
from benchmarks.local_group.setup import (  # noqa: E402
    Load,
    add_options,
    new_streams,
    new_trial,
    run_benchmark,
    running_group,
)
from benchmarks.machine import describe  # noqa: E402
from cluster.coordinator.view import MembershipChange  # noqa: E402

LOAD = Load(num_greedy=6, num_sampled=2, longest_prompt=256, max_tokens=(100, 300))
THREAD = "heartbeats"
_LOCK_EVERY_S = 3.0


async def idle_percent(group: LocalGroup, seconds: float) -> dict[str, list[float]]:
    """Return which part of a core each shard takes while nobody asks: its heartbeats, and all of it."""
    pids = [shard.pid for shard in group.alive("shard")]
    before, began_s = [cpu_seconds(pid) for pid in pids], time.monotonic()
    await asyncio.sleep(seconds)
    after, took_s = [cpu_seconds(pid) for pid in pids], time.monotonic() - began_s

    def percent(of: str | None) -> list[float]:
        used_s = [sum(later.values()) - sum(earlier.values()) if of is None else later[of] - earlier[of]
                  for earlier, later in zip(before, after, strict=True)]
        return [round(100 * one / took_s, 3) for one in used_s]
    return {"heartbeats": percent(THREAD), "process": percent(None)}


@contextlib.contextmanager
def noise(num_processes: int) -> Iterator[None]:
    """Have so many processes compute all the time, at the priority of this one."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


async def changes_within(group: LocalGroup, seconds: float) -> list[MembershipChange]:
    """Make its shards hold Python's lock, and return what changed the members of the group that runs meanwhile."""
    epoch = (await group.status()).view.epoch
    number, found, until_s = epoch.number if epoch else 0, dict[int, MembershipChange](), time.monotonic() + seconds
    shards = itertools.cycle(group.alive("shard"))
    while time.monotonic() < until_s:
        next(shards).hold_python_lock()
        await asyncio.sleep(_LOCK_EVERY_S)
        for change in (await group.status()).membership_changes:
            if change.epoch_before >= number and change.epoch_before not in found:
                print(f"false: {change}", file=sys.stderr, flush=True)
                found[change.epoch_before] = change
    return list(found.values())


async def measure(options: argparse.Namespace, _: Load, seed: int, folder: Path) -> dict[str, object]:
    """Return what the last line says."""
    async with running_group(options, LOAD, folder) as group:
        trial = await new_trial(group, LOAD, seed)
        await until_idle(group)
        idle = await idle_percent(group, options.idle_s)
        streams = new_streams(group, trial)
        streams.start()
        with noise(options.busy):
            changes = await changes_within(group, 60.0 * options.minutes)
        await streams.finish()
    return {"seed": seed, "false_changes": Counter(change.cause for change in changes), **streams.outcome.verdict,
            "idle_percent_of_a_core": idle}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="of noise")
    parser.add_argument("--busy", type=int, default=4, help="processes that compute all the time")
    parser.add_argument("--idle-s", type=float, default=60.0, help="over which the cost at idle is taken")
    parser.set_defaults(members=4, model="tiny")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    found = run_benchmark(options, measure)
    print(json.dumps({"benchmark": "heartbeats", "model": options.model, "members": options.members,
                      "minutes": options.minutes, "busy": options.busy, "lock_s": LOCK_S, **found,
                      "machine": describe()}))
    sys.exit(1 if found["false_changes"] or found["failed"] or found["wrong"] else 0)


if __name__ == "__main__":
    main()
