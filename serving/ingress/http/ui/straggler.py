"""Names the member that the others wait for, from the work that was timed. Pure.

All members step together, so whoever takes longer than its profile says holds everybody up: work is placed by profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from serving.link.epoch import WorkRatio

MARGIN = 1.2        # over the others' median: less is noise


@dataclass(frozen=True, slots=True)
class Straggler:
    rank: int
    reason: str


def find_straggler(ratios: Sequence[WorkRatio | None]) -> Straggler | None:
    """Return the slowest member against its profile, where it stands out; `ratios` by rank, None for one not timed."""
    found: list[tuple[float, Straggler]] = []
    for part, words in (("experts", "its experts take"), ("own", "its own rows take")):
        times = {rank: value for rank, ratio in enumerate(ratios)
                 if ratio is not None and (value := getattr(ratio, part)) is not None}
        if not times:
            continue
        slowest = max(times, key=lambda rank: times[rank])
        others = [value for rank, value in times.items() if rank != slowest]
        usual = median(others) if others else 1.0
        if times[slowest] >= MARGIN * usual:
            found.append((times[slowest] / usual, Straggler(slowest, _reason(words, times[slowest], others, usual))))
    return max(found, key=lambda entry: entry[0])[1] if found else None


def _reason(words: str, own: float, others: Sequence[float], usual: float) -> str:
    beside = f", the others {usual:.2f} x" if others else ""
    return (f"{words} {own:.2f} x as long as its profile says{beside}: look for other processes on its node, or a "
            "processor that is throttled")
