"""Pure. Makes the rows of `moesaic status`, and what is said below them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells

from cluster.coordinator.view import ClusterStatus, ShardState
from cluster.whatif.expert_ranges import expert_id_ranges
from model.placement import Placement
from serving.link.epoch import Epoch, Member, ShardStatus

MAX_A_NODE = 4          # more shards of one node, pool and state are one row
_LONG_RANGES = 9        # characters
_MIN_NAME_CELLS = 8

Shard = tuple[Member, ShardStatus]


@dataclass(frozen=True, slots=True)
class ShardRow:
    """Shows one shard, or several that are alike, as people read it. `note` stands below the name."""

    name: str
    state: str
    experts: str
    memory: str
    kv: str
    load: str
    rows: str
    short_rows: str         # where there is little room
    note: str = ""


def shard_rows(status: ClusterStatus) -> list[ShardRow]:
    """Return the rows of all shards that live, in the order of their ranks."""
    epoch = status.view.epoch
    ranks = _ranks(epoch)
    living = sorted((entry for entry in status.shards if not _is_past(entry, ranks)),
                    key=lambda entry: ranks.get(entry[0].shard_id, len(ranks)))
    groups: dict[object, list[Shard]] = defaultdict(list)
    alike = Counter(_kind(entry) for entry in living)
    for entry in living:
        kind = _kind(entry)
        groups[kind if alike[kind] > MAX_A_NODE else entry[0].shard_id].append(entry)
    total_rows = sum(shard.num_expert_rows for _, shard in status.shards)
    has_pools = len({member.pool for member, _ in status.shards}) > 1
    return [_row(shards, epoch, total_rows, has_pools) for shards in groups.values()]


def messages(status: ClusterStatus) -> list[str]:
    """Return what shards say went wrong, each text once, and how many shards of earlier epochs have ended."""
    ranks = _ranks(status.view.epoch)
    names_of: dict[str, list[str]] = defaultdict(list)
    for member, shard in status.shards:
        if shard.detail:
            names_of[shard.detail].append(member.node_name)
    lines = [f"{_counted(names)}: {detail}" for detail, names in names_of.items()]
    ended = [member.node_name for member, shard in status.shards if _is_past((member, shard), ranks)]
    if ended:
        shards = "1 shard has" if len(ended) == 1 else f"{len(ended)} shards have"
        lines.append(f"{shards} ended: {_counted(ended)}")
    return lines


def short_names(names: Sequence[str], max_cells: int) -> list[str]:
    """Return the names in at most so many columns of a terminal: what is in the middle of long ones is left out."""
    max_cells = max(max_cells, _MIN_NAME_CELLS)
    return [name if cell_len(name) <= max_cells else _middle_out(name, max_cells) for name in names]


def expert_ranges(placement: Placement, rank: int) -> str:
    """Return how many copies, and which: '60: 0-1' when short and alike in all layers, else '80: 2-3 a layer'."""
    of_layer = [placement.experts_of(layer, rank) for layer in range(placement.num_layers)]
    counts = sorted({len(experts) for experts in of_layer})
    total = sum(map(len, of_layer))
    if not total:
        return "none"
    ranges = expert_id_ranges(of_layer[0])
    if len(set(of_layer)) == 1 and len(ranges) <= _LONG_RANGES:
        return f"{total}: {ranges}"
    return f"{total}: {'-'.join(map(str, (counts[0], counts[-1]) if len(counts) > 1 else counts))} a layer"


def _ranks(epoch: Epoch | None) -> dict[str, int]:
    return {member.shard_id: rank for rank, member in enumerate(epoch.members)} if epoch else {}


def _is_past(entry: Shard, ranks: dict[str, int]) -> bool:
    return entry[1].state == ShardState.FAILED and entry[0].shard_id not in ranks


def _kind(entry: Shard) -> tuple[str, str, str]:
    return entry[0].node_name, entry[0].pool, entry[1].state


def _row(shards: list[Shard], epoch: Epoch | None, total_rows: int, has_pools: bool) -> ShardRow:
    member, first = shards[0]
    name = f"{member.node_name} ({member.pool})" if has_pools else member.node_name
    resident, budget = (sum(shard.resident_bytes for _, shard in shards),
                        sum(one.facts.memory_budget_bytes for one, _ in shards))
    num_rows = sum(shard.num_expert_rows for _, shard in shards)
    share = f" ({num_rows / total_rows:.0%})" if total_rows else ""
    speed = member.profile.emulated_speed if member.profile else None
    return ShardRow(
        name if len(shards) == 1 else f"{len(shards)} x {name}", first.state, _experts(shards, epoch),
        f"{_mib(resident)} of {_mib(budget)}", _caches(shards),
        f"{sum(shard.num_running for _, shard in shards)}+{sum(shard.num_waiting for _, shard in shards)}",
        f"{num_rows:,}{share}", f"{_short(num_rows)}{share}",
        "" if speed is None else f"(emulated\n{speed:g})")


def _caches(shards: list[Shard]) -> str:
    """Return the part of the KV blocks that is in use, and where layers keep states that of their slots."""
    blocks, slots = (sum(shard.kv_blocks_total for _, shard in shards),
                     sum(shard.state_slots_total for _, shard in shards))
    if not blocks:
        return "-"
    kv = f"{1 - sum(shard.kv_blocks_free for _, shard in shards) / blocks:.0%}"
    return f"{kv} / states {1 - sum(shard.state_slots_free for _, shard in shards) / slots:.0%}" if slots else kv


def _experts(shards: list[Shard], epoch: Epoch | None) -> str:
    ranks = _ranks(epoch)
    of_shards = [ranks[member.shard_id] for member, _ in shards if member.shard_id in ranks]
    if epoch is None or not of_shards:
        return "-"
    if len(of_shards) == 1:
        return expert_ranges(epoch.placement, of_shards[0])
    layers = range(epoch.placement.num_layers)
    return f"{sum(len(epoch.placement.experts_of(layer, rank)) for rank in of_shards for layer in layers)} copies"


def _counted(names: Sequence[str]) -> str:
    """Return 'a, b (3 shards)'."""
    return ", ".join(name if count == 1 else f"{name} ({count} shards)" for name, count in Counter(names).items())


def _middle_out(name: str, max_cells: int) -> str:
    """Keep the end above all: hosts that are numbered differ there."""
    head_cells = (max_cells - 1) // 3
    head = chop_cells(name, head_cells)[0] if head_cells else ""
    tail = name
    while cell_len(tail) > max_cells - 1 - cell_len(head):
        tail = tail[1:]
    return f"{head}…{tail}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def _short(count: int) -> str:
    """Return three digits and a unit."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return str(count)
