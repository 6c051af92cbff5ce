"""Shows `moesaic status` as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cluster.cli.shard_rows import ShardRow, messages, shard_rows, short_names
from cluster.coordinator.view import ClusterStatus, MembershipChange, PlacementStatus

SHOWN_CHANGES = 5
_COLOURS = {"ready": "green", "failed": "red"}


class StatusView:
    """Shows the group's health, its shards (node x experts x memory x rows computed), what they say, and the doors."""

    def __init__(self, status: ClusterStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, view = self._status, self._status.view
        number = view.epoch.number if view.epoch else 0
        health = Text(status.health, style="green" if status.is_ready else "yellow")
        yield Text.assemble("group: ", health, f"   epoch: {number}" if number else "   no epoch yet")
        if view.why:
            yield Text(view.why, style="yellow")
        if view.leaving:
            yield Text(f"told to leave: {', '.join(view.leaving)}", style="yellow")
        yield _table_that_fits(shard_rows(status), console, options)
        for message in messages(status):
            yield Text(message, style="red")
        yield from (Text(line) for line in _change_lines(status.membership_changes))
        for router in status.routers:
            yield Text(f"router {router.router_id} on {router.node_name}: HTTP at {router.http_address}, gRPC at "
                       f"{router.grpc_address}, {'ready' if router.is_ready else 'not ready'}, epoch "
                       f"{router.epoch_number}")


def _change_lines(changes: Sequence[MembershipChange]) -> Iterator[str]:
    """Yield a line for each of the latest changes of members, the newest last."""
    for change in changes[-SHOWN_CHANGES:]:
        if not change.epoch_after and not change.epoch_before:
            continue                # the first start, which the lines above are about
        when = time.strftime("%H:%M:%S", time.localtime(change.at_s))
        who = f" {', '.join(change.shard_ids)}" if change.shard_ids and change.cause != "start" else ""
        steps = [f"{name} {_duration(value)}" for name, value in (
            ("detected", change.detected_ms), ("regrouped", change.regrouped_ms), ("loaded", change.loaded_ms),
            ("resumed", change.resumed_ms)) if value is not None]
        after = f"epoch {change.epoch_before} -> {change.epoch_after or '?'}"
        moved = f"; moved: {', '.join(f'{num} {way}' for way, num in change.moved.items())}" if change.moved else ""
        yield f"{when} {after}: {change.cause}{who}{' after: ' if steps else ''}{', '.join(steps)}{moved}"


def _duration(num_ms: float) -> str:
    return f"{num_ms:.0f} ms" if num_ms < 10_000 else f"{num_ms / 1e3:.1f} s"


def _table_that_fits(rows: list[ShardRow], console: Console, options: ConsoleOptions) -> Table:
    """Every column is whole at 80 columns: where there is too little room, counts and names are shortened."""
    names = [row.name for row in rows]
    table = _table(rows, names, is_short=False)
    for is_short in (False, True):
        table = _table(rows, names, is_short)
        excess = table.__rich_measure__(console, options.update(max_width=10_000)).maximum - options.max_width
        if excess <= 0:
            return table
        longest = max(Text(name).cell_len for name in names)
        if longest - excess >= 12 or is_short:
            return _table(rows, short_names(names, longest - excess), is_short)
    return table


def _table(rows: list[ShardRow], names: list[str], is_short: bool) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("node", "state", "experts", "memory MiB", "KV", "load", "rows"):
        is_text = column in ("node", "state", "experts")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row, name in zip(rows, names, strict=True):
        table.add_row(Text(f"{name}\n{row.note}" if row.note else name),
                      Text(row.state, style=_COLOURS.get(row.state, "yellow")), row.experts, row.memory,
                      row.kv.replace(" / ", "\n") if is_short else row.kv, row.load,
                      row.short_rows if is_short else row.rows)
    return table


def status_json(status: ClusterStatus, placement: PlacementStatus | None = None) -> str:
    """Return one JSON object with everything the coordinator knows; if asked for, `expert_rows` by layer and expert,
    and `work_over_profile` by rank."""
    content = asdict(status)
    content["is_ready"] = status.is_ready
    if placement is not None:
        content["expert_rows"] = placement.load.rows().round(1).tolist()
        content["work_over_profile"] = [asdict(ratio) if ratio else None for ratio in placement.ratios]
    return json.dumps(content, default=str)      # a secret says so
