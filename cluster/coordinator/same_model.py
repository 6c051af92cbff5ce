"""Keeps apart shards that compute different models: a group of both would answer with numbers of neither. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.coordinator.reports import Report
from cluster.coordinator.view import ShardState, View
from serving.link.epoch import Epoch


def left_out(reports: Sequence[Report], last: Epoch | None, heard_since_s: float) -> dict[str, str]:
    """Return who may not be in the group, with the reason.

    What the `last` epoch's members compute counts as long as any of them lives, that is, was heard since then. Else it
    is what most shards do, of those in an epoch that is not known here where there are any; of as many, the first one.
    """
    live = [report for report in reports
            if report.status.state != ShardState.FAILED and report.at_s >= heard_since_s]
    of_last = [member.digest for report in live for member in (last.members if last else ())
               if member.shard_id == report.member.shard_id]
    wanted = of_last[0] if of_last else _most_common(live)
    return {report.member.shard_id: _reason(report.member.digest, wanted) for report in reports
            if report.member.digest != wanted}


def _most_common(live: Sequence[Report]) -> str:
    counted = [report for report in live if report.status.epoch_number] or live
    counts = Counter(report.member.digest for report in sorted(counted, key=lambda report: report.first_s))
    return counts.most_common(1)[0][0] if counts else ""


def _reason(digest: str, wanted: str) -> str:
    theirs = dict(word.partition("=")[::2] for word in wanted.split())
    differs = [f"{word}, the group's is {theirs.get(word.partition('=')[0], 'unknown')}" for word in digest.split()
               if word not in wanted.split()]
    return (f"left out of the group, which computes another model: {'; '.join(differs) or 'it does not say which'}. "
            "Give all shards the same checkpoint files, config and version")


def with_left_out(view: View, why_left_out: Mapping[str, str]) -> View:
    """Return a view of a group that waits with those whom it does not wait for."""
    if view.epoch is not None or not why_left_out:
        return view
    shards = ", ".join(sorted(why_left_out))
    return replace(view, why=f"{view.why}; left out as they compute another model: {shards}")
