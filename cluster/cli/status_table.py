"""`moesaic status` as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.coordinator.view import ClusterStatus, PlacementStatus
from cluster.whatif.expert_ranges import expert_id_ranges
from model.placement import Placement
from serving.link.epoch import Member

_LONG_RANGES = 9        # characters
_COLOURS = {"ready": "green", "failed": "red"}


def status_view(status: ClusterStatus) -> Group:
    """The group's health, its shards (node x experts x memory x rows computed), and the doors."""
    view = status.view
    number = view.epoch.number if view.epoch else 0
    health = Text("healthy" if status.is_ready else str(view.phase), style="green" if status.is_ready else "yellow")
    head = Text.assemble("group: ", health, f"   epoch: {number}" if number else "   no epoch yet")
    parts: list[Text | Table] = [head]
    if view.why:
        parts.append(Text(view.why, style="yellow"))
    parts.append(_shard_table(status))
    for router in status.routers:
        parts.append(Text(f"router {router.router_id} on {router.node_name}: gRPC at {router.grpc_address}, "
                          f"{'ready' if router.is_ready else 'not ready'}, epoch {router.epoch_number}"))
    return Group(*parts)


def _shard_table(status: ClusterStatus) -> Table:
    """Fits 80 columns. Shards in the order of their ranks."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("node", "state", "experts", "memory MiB", "KV", "load", "rows"):
        is_text = column in ("node", "state", "experts")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    epoch = status.view.epoch
    ranks = {member.shard_id: rank for rank, member in enumerate(epoch.members)} if epoch else {}
    total_rows = sum(shard.num_expert_rows for _, shard in status.shards)
    has_pools = len({member.pool for member, _ in status.shards}) > 1
    for member, shard in sorted(status.shards, key=lambda entry: ranks.get(entry[0].shard_id, len(ranks))):
        rank = ranks.get(member.shard_id)
        share = f" ({shard.num_expert_rows / total_rows:.0%})" if total_rows else ""
        used = shard.kv_blocks_total - shard.kv_blocks_free
        table.add_row(
            (f"{member.node_name} ({member.pool})" if has_pools else member.node_name) + _emulation(member),
            Text(shard.state, style=_COLOURS.get(shard.state, "yellow")),
            "-" if rank is None or epoch is None else expert_ranges(epoch.placement, rank),
            f"{_mib(shard.resident_bytes)} of {_mib(member.facts.memory_budget_bytes)}",
            f"{used / shard.kv_blocks_total:.0%}" if shard.kv_blocks_total else "-",
            f"{shard.num_running}+{shard.num_waiting}", f"{shard.num_expert_rows:,}{share}")
        if shard.detail:
            table.add_row("", Text(shard.detail, style="red"))
    return table


def _emulation(member: Member) -> str:
    """On lines of its own below the node's name: the table has little room."""
    speed = member.profile.emulated_speed if member.profile else None
    return "" if speed is None else f"\n(emulated\n{speed:g})"


def expert_ranges(placement: Placement, rank: int) -> str:
    """Copies, and which: '60: 0-1' when that is short and the same in all MoE layers, else '80: 2-3 a layer'."""
    of_layer = [placement.experts_of(layer, rank) for layer in range(placement.num_layers)]
    counts = sorted({len(experts) for experts in of_layer})
    total = sum(map(len, of_layer))
    if not total:
        return "none"
    ranges = expert_id_ranges(of_layer[0])
    if len(set(of_layer)) == 1 and len(ranges) <= _LONG_RANGES:
        return f"{total}: {ranges}"
    return f"{total}: {'-'.join(map(str, (counts[0], counts[-1]) if len(counts) > 1 else counts))} a layer"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def status_json(status: ClusterStatus, placement: PlacementStatus | None = None) -> str:
    """One JSON object with everything the coordinator knows; if asked for, `expert_rows` by layer and expert, and
    `work_over_profile` by rank."""
    content = asdict(status)
    content["is_ready"] = status.is_ready
    if placement is not None:
        content["expert_rows"] = placement.load.rows().round(1).tolist()
        content["work_over_profile"] = [asdict(ratio) if ratio else None for ratio in placement.ratios]
    return json.dumps(content)
