"""Follows the group from one epoch to the next, and tells what changed its members and how long that took.

Pure but for what it remembers: it is told what there is to see, and when.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cluster.coordinator.membership import UNKNOWN
from cluster.coordinator.reports import Report
from cluster.coordinator.view import GroupPhase, MembershipCause, MembershipChange, ShardState, View
from serving.link.epoch import Epoch

MAX_CHANGES = 20


@dataclass(frozen=True, slots=True)
class Seen:
    """Holds one look of the coordinator at its group."""

    view: View
    reports: tuple[Report, ...]
    why_ended: str                  # the last epoch, until there is another
    now_s: float
    at_s: float                     # likewise, on the wall clock
    kept_out: frozenset[str] = frozenset()      # shards that live, and could not reach others


@dataclass(slots=True)
class _Open:
    """A change from its first sign until the group runs again. Times on the coordinator's clock."""

    began_s: float
    change: MembershipChange        # as far as it is known
    heard_s: dict[str, float]       # when members of the epoch before were last heard
    failed: set[str] = field(default_factory=set)       # of them, who has said or was said to have ended
    kept_out: frozenset[str] = frozenset()
    has_slept: bool = False

    def ms(self, now_s: float) -> float:
        return round(1e3 * (now_s - self.began_s), 1)


class MembershipHistory:
    def __init__(self, now_s: float, at_s: float) -> None:
        """Begin before the first epoch: what comes is the start of the group."""
        self._before: Epoch | None = None       # the last one that ran
        self._sign_s: float | None = None       # since when it does not run as it should
        self._leaving: set[str] = set()
        self._open: _Open | None = _Open(now_s, _change(0, at_s), {})
        self._closed: deque[MembershipChange] = deque(maxlen=MAX_CHANGES)
        self._moved_of: dict[str, Mapping[str, int]] = {}       # by router, all that it has moved, by way
        self._handed_over: Counter[str] = Counter()             # before those go who leave

    @property
    def changes(self) -> tuple[MembershipChange, ...]:
        """Return the latest ones, oldest first; the last may be under way."""
        return (*self._closed, self._open.change)[-MAX_CHANGES:] if self._open else tuple(self._closed)

    def adopt(self, epoch: Epoch, changes: Iterable[MembershipChange]) -> None:
        """Go on from an epoch that another coordinator made, and the changes until then that a member knows."""
        self._before, self._open, self._sign_s = epoch, None, None
        known = {change.epoch_after for change in self._closed}
        self._closed.extend(change for change in changes if change.epoch_after not in (0, *known))

    def note_moved(self, router_id: str, num_moved: Mapping[str, int]) -> None:
        """Hear how many sequences a router has moved in all, by way. They belong to the change that is under way, to
        that of those who leave now, else to the latest."""
        new = Counter(num_moved) - Counter(self._moved_of.get(router_id, num_moved))
        self._moved_of[router_id] = num_moved
        if self._open is not None:
            self._open.change = _with_moved(self._open.change, new)
        elif self._leaving:
            self._handed_over += new
        elif self._closed:
            self._closed[-1] = _with_moved(self._closed[-1], new)

    def forget_router(self, router_id: str) -> None:
        self._moved_of.pop(router_id, None)

    def observe(self, seen: Seen) -> MembershipChange | None:
        """Look once. Return a change that has come to its end."""
        before, epoch = self._before, seen.view.epoch
        if before is not None and epoch is not None and epoch.number == before.number:
            self._leaving = set(seen.view.leaving)
            self._look_for_signs(before, seen)
            return None
        self._leaving |= set(seen.view.leaving)
        if self._open is None and before is not None:
            self._begin(before, seen)
        if self._open is not None and before is not None:
            self._open.has_slept |= seen.view.is_asleep
        return self._go_on(self._open, epoch, seen) if self._open is not None and epoch is not None else None

    def _look_for_signs(self, before: Epoch, seen: Seen) -> None:
        states = {report.status.state for report in seen.reports if report.status.epoch_number == before.number
                  and before.rank_of(report.member.shard_id) is not None}
        is_planned = seen.view.coming is not None
        if states <= {ShardState.READY, UNKNOWN} and not is_planned:
            self._sign_s = None
        elif self._sign_s is None:
            self._sign_s = seen.now_s

    def _begin(self, before: Epoch, seen: Seen) -> None:
        began_s = seen.now_s if self._sign_s is None else self._sign_s
        heard_s = {report.member.shard_id: report.at_s for report in seen.reports}
        self._open = _Open(began_s, replace(_change(before.number, seen.at_s), detail=seen.why_ended), heard_s)
        self._open.change = replace(_with_moved(self._open.change, self._handed_over),
                                    detected_ms=self._open.ms(seen.now_s))
        self._handed_over = Counter()

    def _go_on(self, open_: _Open, epoch: Epoch, seen: Seen) -> MembershipChange | None:
        _note_failed(open_, seen.reports)
        open_.kept_out |= seen.kept_out
        change = open_.change
        if change.epoch_after != epoch.number:
            change = self._regrouped(open_, epoch, seen)
        if change.loaded_ms is None and seen.view.phase in (GroupPhase.JOINING, GroupPhase.READY):
            change = replace(change, loaded_ms=open_.ms(seen.now_s))
        open_.change = change
        if seen.view.phase is not GroupPhase.READY:
            return None
        change = replace(change, resumed_ms=open_.ms(seen.now_s))
        self._closed.append(change)
        self._before, self._open, self._sign_s, self._leaving = epoch, None, None, set()
        return change

    def _regrouped(self, open_: _Open, epoch: Epoch, seen: Seen) -> MembershipChange:
        cause, shard_ids = _cause(self._before, epoch, self._leaving, open_)
        change = replace(open_.change, cause=cause, shard_ids=shard_ids)
        if cause == "cut_off":
            change = replace(change, detail=seen.view.why)
        if change.is_planned or cause in ("start", "slept"):
            change = replace(change, detected_ms=None)
        elif cause == "hung" and change.detected_ms is not None:
            # Silence is its first sign, and nobody reports that it begins.
            detected_s = open_.began_s + change.detected_ms / 1e3
            open_.began_s = min(open_.began_s, *(open_.heard_s.get(one, open_.began_s) for one in shard_ids))
            change = replace(change, detected_ms=open_.ms(detected_s))
        return replace(change, epoch_after=epoch.number, regrouped_ms=open_.ms(seen.now_s), loaded_ms=None)


def _change(epoch_before: int, at_s: float) -> MembershipChange:
    return MembershipChange(epoch_before, 0, "start" if not epoch_before else "broke", (), at_s)


def _with_moved(change: MembershipChange, new: Mapping[str, int]) -> MembershipChange:
    return replace(change, moved=dict(Counter(change.moved) + Counter(new))) if new else change


def _note_failed(open_: _Open, reports: Iterable[Report]) -> None:
    for report in reports:
        open_.failed |= set(report.status.lost_peers)
        if report.status.state == ShardState.FAILED:
            open_.failed.add(report.member.shard_id)


def _cause(before: Epoch | None, after: Epoch, leaving: set[str],
           open_: _Open) -> tuple[MembershipCause, tuple[str, ...]]:
    """Return what changed the members, and who went; who came where nobody went."""
    now = tuple(member.shard_id for member in after.members)
    if before is None:
        return "start", now
    if open_.has_slept:
        return "slept", now
    were = tuple(member.shard_id for member in before.members)
    gone, came = tuple(one for one in were if one not in now), tuple(one for one in now if one not in were)
    if gone and set(gone) <= leaving:
        return "resized" if came else "drained", gone
    if gone and set(gone) <= open_.kept_out:
        return "cut_off", gone
    if gone:
        return "died" if set(gone) & open_.failed else "hung", gone
    return ("joined", came) if came else ("broke", ())
