"""Members that live, and cannot reach each other: who of them is kept out, so that the others can go on. Pure.

One gives the other up, or each the other, and both report themselves. Once that may pass: all of them go on. When it
comes again the two are kept apart: for a while that grows, and as long as one that is left out does not hear the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cluster.coordinator.reports import HAS_LEFT, Report
from serving.link.epoch import Epoch, Member

FIRST_DELAY_S = 15.0        # that two are kept apart when they break an epoch again; twice as long each time after that
LONGEST_DELAY_S = 3600.0
FORGET_AFTER_S = 300.0      # beyond that, two that did not quarrel again begin anew

Pair = frozenset[str]       # of shard ids


@dataclass(frozen=True, slots=True)
class Quarrel:
    pair: Pair
    epoch_number: int       # of the latest epoch that it broke
    at_s: float
    num_epochs: int = 1     # that it broke

    @property
    def until_s(self) -> float:
        """Return until when the two are kept apart in any case."""
        if self.num_epochs == 1:
            return self.at_s
        return self.at_s + min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self.num_epochs - 2, 20))


def accusations(reports: Iterable[Report]) -> frozenset[Pair]:
    """Return the pairs of which one has left its epoch and does not hear the other now."""
    return frozenset(frozenset({report.member.shard_id, peer}) for report in reports
                     if report.status.state in HAS_LEFT for peer in report.status.lost_peers)


def noted(quarrels: Sequence[Quarrel], epoch: Epoch | None, reports: Sequence[Report],
          now_s: float) -> tuple[Quarrel, ...]:
    """Return them with those by which `epoch` was broken, less those that are forgotten."""
    accused = accusations(reports)
    left = {report.member.shard_id for report in reports if epoch
            and report.status.state in HAS_LEFT and report.status.epoch_number == epoch.number
            and epoch.rank_of(report.member.shard_id) is not None}
    known = {quarrel.pair: quarrel for quarrel in quarrels
             if quarrel.pair in accused or now_s <= quarrel.until_s + FORGET_AFTER_S}
    for pair in accused:
        before = known.get(pair)
        if epoch and pair <= left and (before is None or before.epoch_number != epoch.number):
            known[pair] = Quarrel(pair, epoch.number, now_s, before.num_epochs + 1 if before else 1)
    return tuple(known.values())


def kept_apart(quarrels: Iterable[Quarrel], reports: Iterable[Report], now_s: float) -> frozenset[Pair]:
    """Return the pairs of which only one may be in the next epoch."""
    accused = accusations(reports)
    return frozenset(quarrel.pair for quarrel in quarrels
                     if quarrel.num_epochs > 1 and (now_s < quarrel.until_s or quarrel.pair in accused))


def ways_apart(pairs: Collection[Pair], present: Collection[Report]) -> list[Pair]:
    """Return whom to keep out so that of those present no pair is together, the ways to be tried first before others.

    As few as possible: who quarrels with many goes. Then those with the fewest sequences, then the fewest experts; of
    equals those whose ids come last.
    """
    statuses = {report.member.shard_id: report.status for report in present}

    def cost(out: Pair) -> tuple[int, int, int]:
        of_out = [statuses[shard_id] for shard_id in out]
        return (len(out), sum(status.num_running + status.num_waiting for status in of_out),
                sum(status.num_expert_copies for status in of_out))
    ways = set(_covers(frozenset(pair for pair in pairs if pair <= statuses.keys())))
    return sorted(sorted(ways, key=sorted, reverse=True), key=cost)


def _covers(pairs: frozenset[Pair]) -> Iterator[Pair]:
    """Yield sets of members that have one of every pair, the smallest ones among them."""
    if not pairs:
        yield frozenset()
        return
    counts = Counter(shard_id for pair in sorted(pairs, key=sorted) for shard_id in sorted(pair))
    first = counts.most_common(1)[0][0]
    others = frozenset(shard_id for pair in pairs if first in pair for shard_id in pair) - {first}
    for out in (frozenset({first}), others):
        for rest in _covers(frozenset(pair for pair in pairs if not pair & out)):
            yield out | rest


def unheard_by(member: Member, pairs: Iterable[Pair], others: Iterable[Member]) -> tuple[str, ...]:
    """Return the shard ids of those others with which it may not be in a group."""
    apart = {shard_id for pair in pairs if member.shard_id in pair for shard_id in pair - {member.shard_id}}
    return tuple(other.shard_id for other in others if other.shard_id in apart)


def kept_out(quarrels: Iterable[Quarrel], epoch: Epoch | None, reports: Collection[Report],
             now_s: float) -> dict[str, str]:
    """Return the shards that are not in the epoch as they do not hear members of it, or are not heard, with that. Who
    has not said that it left its epoch may be dead."""
    pairs = kept_apart(quarrels, reports, now_s) | accusations(reports)
    outside = [report.member for report in reports
               if epoch and epoch.rank_of(report.member.shard_id) is None and report.status.state in HAS_LEFT]
    found = {member.shard_id: unheard_by(member, pairs, epoch.members if epoch else ()) for member in outside}
    return {shard_id: f"kept out of the group: it and {', '.join(others)} live, and do not reach each other. Look at "
                      "the network between them; it may join when they hear each other again"
            for shard_id, others in found.items() if others}
