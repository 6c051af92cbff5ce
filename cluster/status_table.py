"""`moesaic status` as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.coordinator import ClusterStatus
from model.placement import Placement

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
                          f"{'ready' if router.is_ready else 'not ready'}, epoch {router.epoch}"))
    return Group(*parts)


def _shard_table(status: ClusterStatus) -> Table:
    table = Table(header_style="bold")
    for column in ("node", "pool", "rank", "state", "experts", "memory", "weights", "KV free", "running", "waiting",
                   "tokens", "expert rows"):
        is_text = column in ("node", "pool", "state", "experts")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "experts")
    epoch = status.view.epoch
    total_rows = sum(shard.num_expert_rows for _, shard in status.shards)
    for member, shard in status.shards:
        rank = epoch.rank_of(member.shard_id) if epoch else None
        share = f" ({shard.num_expert_rows / total_rows:.0%})" if total_rows else ""
        table.add_row(
            member.node_name, member.pool, "-" if rank is None else str(rank),
            Text(shard.state, style=_COLOURS.get(shard.state, "yellow")),
            "-" if rank is None or epoch is None else expert_ranges(epoch.placement, rank),
            f"{_mib(shard.resident_bytes)} of {_mib(member.facts.memory_budget_bytes)} MiB",
            f"{_mib(shard.weights_bytes)} MiB",
            f"{shard.kv_blocks_free}/{shard.kv_blocks_total}", str(shard.num_running), str(shard.num_waiting),
            str(shard.num_tokens_computed), f"{shard.num_expert_rows}{share}")
        if shard.detail:
            table.add_row("", "", "", Text(shard.detail, style="red"))
    return table


def expert_ranges(placement: Placement, rank: int) -> str:
    """'0-3 in 30 layers' when all MoE layers agree, else how many copies in how many layers."""
    of_layer = [placement.experts_of(layer, rank) for layer in range(placement.num_layers)]
    if not any(of_layer):
        return "none"
    if len(set(of_layer)) == 1:
        return f"{_ranges(of_layer[0])} in {len(of_layer)} layers"
    counts = [len(experts) for experts in of_layer]
    return f"{min(counts)} to {max(counts)} a layer, {sum(counts)} in all"


def _ranges(experts: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> '0-2,5'."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and expert == runs[-1][1] + 1:
            runs[-1][1] = expert
        else:
            runs.append([expert, expert])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def status_json(status: ClusterStatus) -> str:
    """One JSON object with everything the coordinator knows."""
    content = asdict(status)
    content["is_ready"] = status.is_ready
    return json.dumps(content)
