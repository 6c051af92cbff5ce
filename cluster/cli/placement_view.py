"""The placement, its changes and the experts' loads, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.cli.shard_rows import expert_ranges
from cluster.coordinator.view import PlacementStatus
from cluster.planner.layer.error import PlacementError
from model.placement import Placement
from serving.link.epoch import Epoch, PlacementChange, PlanFigures, WorkRatio

NUM_HOTTEST = 4
_STATES = {"done": "green", "running": "yellow", "failed": "red"}


def placement_view(status: PlacementStatus) -> Group:
    epoch = status.epoch
    parts: list[Text | Table] = [Text(_headline(status))]
    if epoch.figures is not None:
        parts += [Text(line) for line in figure_lines(epoch.figures)]
    table = _table("rank", "node", "pool", "requests", "budget", "experts")
    for rank, member in enumerate(epoch.members):
        share = epoch.shares[rank]
        speed = member.profile.emulated_speed if member.profile else None
        name = member.node_name if speed is None else f"{member.node_name} (emulated {speed:g})"
        table.add_row(str(rank), name, member.pool, f"{share.fraction:.1%}", str(share.token_budget),
                      expert_ranges(epoch.placement, rank))
    return Group(*parts, table, *_work_lines(status))


def _headline(status: PlacementStatus) -> str:
    coming = f", revision {status.next_revision} is prepared" if status.next_revision is not None else ""
    return f"epoch {status.epoch.number}, revision {status.epoch.revision}{coming}"


def _work_lines(status: PlacementStatus) -> list[Text]:
    """Show how long each member works, which tells one that is slow."""
    return [Text(f"rank {rank}: {_work_words(ratio)}") for rank, ratio in enumerate(status.ratios)]


def _work_words(ratio: WorkRatio | None) -> str:
    if ratio is None:
        return "work not measured yet"
    parts = (("own", ratio.own, ratio.own_spread), ("experts", ratio.experts, ratio.experts_spread))
    known = [f"{part} {mean:.2f} ± {spread:.2f}" for part, mean, spread in parts if mean is not None]
    planning = "" if ratio.planning_s is None else f"; planning {ratio.planning_s * 1e3:.2g} ms"
    return f"{', '.join(known)} x the profile{planning}"


def figure_lines(figures: PlanFigures) -> list[str]:
    """Say in words what the plan promises."""
    return [f"planned ({figures.solver}) for {figures.num_rows} rows a step at {figures.context_tokens} tokens of "
            f"context:",
            f"  step {figures.step_s * 1e3:.2f} ms, {figures.tokens_per_s:,.0f} tokens/s; the bound is "
            f"{figures.bound_s * 1e3:.2f} ms (ratio {figures.ratio:.3f}); limited by {figures.limit}"]


def history_view(changes: tuple[PlacementChange, ...]) -> Table | Text:
    if not changes:
        return Text("no change of the placement in this epoch")
    table = _table("operation", "state", "revisions", "moved MiB", "why")
    for change in changes:
        detail = f"{change.why}: {change.detail}" if change.detail else change.why
        revisions, moved = f"{change.first_revision} -> {change.last_revision}", f"{change.moved_bytes / 2**20:,.1f}"
        table.add_row(change.operation_id, Text(change.state, style=_STATES[change.state]), revisions, moved, detail)
    return table


def experts_view(status: PlacementStatus) -> Group:
    """Show a line for each layer: how uneven its load is, and its busiest experts with their members."""
    epoch, rows_LE = status.epoch, status.load.rows()
    holders = epoch.placement.holders
    table = _table("layer", "rows", "max/mean", f"busiest {NUM_HOTTEST} experts: share of the layer's rows @ ranks")
    for layer, rows_E in enumerate(rows_LE):
        total = float(rows_E.sum())
        if not total:
            table.add_row(str(layer), "0", "-", "")
            continue
        hottest = rows_E.argsort(kind="stable")[::-1][:NUM_HOTTEST]
        entries = [f"{expert}: {rows_E[expert] / total:.1%} @ {','.join(map(str, holders[layer][expert]))}"
                   for expert in hottest]
        table.add_row(str(layer), f"{total:,.0f}", f"{float(rows_E.max()) / (total / rows_E.size):.2f}",
                      "  ".join(entries))
    names = "  ".join(f"{rank}={member.node_name}" for rank, member in enumerate(epoch.members))
    return Group(Text(f"ranks: {names}"), Text("rows: counted, older ones for less"), table, *_work_lines(status))


def placement_json(status: PlacementStatus) -> str:
    """Return one JSON object; `moesaic placement apply` takes it back, with other `holders`."""
    epoch = status.epoch
    return json.dumps({
        "epoch": epoch.number, "revision": epoch.revision, "next_revision": status.next_revision,
        "members": [_member_json(status, rank) for rank in range(len(epoch.members))],
        "figures": None if epoch.figures is None else {
            **asdict(epoch.figures), "tokens_per_s": epoch.figures.tokens_per_s, "ratio": epoch.figures.ratio},
        "holders": epoch.placement.holders, "changes": history_content(epoch.changes),
        "expert_rows": status.load.rows().round(1).tolist()})


def _member_json(status: PlacementStatus, rank: int) -> dict[str, object]:
    epoch, ratio = status.epoch, status.ratios[rank]
    member = epoch.members[rank]
    share = epoch.shares[rank]
    return {"rank": rank, "shard_id": member.shard_id, "node": member.node_name, "pool": member.pool,
            "request_share": share.fraction, "token_budget": share.token_budget,
            "expert_copies": epoch.placement.num_experts_of(rank),
            "emulated_speed": member.profile.emulated_speed if member.profile else None,
            "work_over_profile": asdict(ratio) if ratio else None}


def history_content(changes: tuple[PlacementChange, ...]) -> list[dict[str, object]]:
    return [{"operation_id": change.operation_id, "state": change.state, "why": change.why, "detail": change.detail,
             "first_revision": change.first_revision, "last_revision": change.last_revision,
             "moved_bytes": change.moved_bytes} for change in changes]


def read_placement(path: Path, epoch: Epoch) -> Placement:
    """Return the `holders` of a JSON file, for every MoE layer, for every expert, by the ranks of the epoch.

    A file with `members` may come from an older epoch: they are found again by their nodes. Raises PlacementError.
    """
    fix = "write it as `moesaic placement show --json` does: {\"holders\": [[[0], [0, 1], ...], ...]}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        members = content.get("members")
        holders = tuple(tuple(tuple(ranks) for ranks in layer) for layer in content["holders"])
        if not all(isinstance(rank, int) and not isinstance(rank, bool)
                   for layer in holders for ranks in layer for rank in ranks):
            raise ValueError("ranks must be whole numbers")
        if members is None:
            return Placement(len(epoch.members), holders)
        rank_of = _ranks_by_node([(str(member["node"]), str(member["pool"])) for member in members], epoch)
        return Placement(len(epoch.members), tuple(
            tuple(tuple(sorted(rank_of[rank] for rank in ranks)) for ranks in layer) for layer in holders))
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}", fix="give the path of a JSON file") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PlacementError(f"{path} is no placement: {error}", fix=fix) from error


def _ranks_by_node(nodes: list[tuple[str, str]], epoch: Epoch) -> list[int]:
    """Return the epoch's rank of each (node, pool). Two shards of a pool on one node are told apart by their order."""
    left: dict[tuple[str, str], list[int]] = {}
    for rank, member in enumerate(epoch.members):
        left.setdefault((member.node_name, member.pool), []).append(rank)
    unknown = sorted({f"{node} ({pool})" for node, pool in nodes if (node, pool) not in left})
    if unknown or len(nodes) != len(epoch.members):
        here = ", ".join(f"{member.node_name} ({member.pool})" for member in epoch.members)
        raise PlacementError(f"the placement is for {len(nodes)} members, unknown are {', '.join(unknown) or 'none'}",
                             fix=f"here are {here}: start from `moesaic placement show --json`")
    return [left[node].pop(0) for node in nodes]


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    numbers = ("rows", "max/mean", "requests", "budget", "moved MiB", "rank", "layer")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table
