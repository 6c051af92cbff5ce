"""What a router's live page shows: what the coordinator says of the group, and what the router counts itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version

from cluster.coordinator.client import CoordinatorApi, CoordinatorUnavailableError
from cluster.coordinator.view import ClusterStatus, GroupPhase, MembershipChange, PlacementStatus, View
from serving.engine.engine import ShardLoad
from serving.ingress.http.ui.heat_map import holder_map, load_map
from serving.ingress.http.ui.request_rates import RequestWindow, Totals
from serving.ingress.http.ui.snapshot import (
    MAX_MEMBERS,
    ChangeView,
    GroupView,
    MemberView,
    RequestsView,
    RouterView,
    Snapshot,
    short_text,
)
from serving.ingress.http.ui.straggler import find_straggler
from serving.link.epoch import Epoch, Member, PlacementChange, ShardStatus, WorkRatio
from serving.metrics import RouterMetrics
from serving.router.router_load import RouterLoad

_ANSWER_S = 2.0         # then the page says that it is old
Loads = dict[tuple[str, str], ShardLoad]        # by shard and pool


class LiveView:
    """`look` asks the coordinator; `placement` is what it last told this router."""

    def __init__(self, model: str, coordinator: CoordinatorApi, metrics: RouterMetrics,
                 load: Callable[[], RouterLoad], wall_clock: Callable[[], float]) -> None:
        self.placement: PlacementStatus | None = None
        self._model = model
        self._coordinator = coordinator
        self._metrics = metrics
        self._load = load
        self._wall_clock = wall_clock
        self._status = ClusterStatus(View(GroupPhase.WAITING, None, "the coordinator has yet to answer"), (), ())
        self._window = RequestWindow(metrics.requests.first_token.bounds_s, metrics.requests.inter_token.bounds_s)

    async def look(self) -> Snapshot:
        """Return how things are; while the coordinator does not answer, how they were."""
        why = ""
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._status = await self._coordinator.status()
        except (CoordinatorUnavailableError, TimeoutError) as error:
            why = f"shown is what was known before: {str(error) or 'the coordinator did not answer in time'}"
        placement = _of_epoch(self.placement, self._status.view.epoch)
        epoch = self._status.view.epoch
        group = group_view(self._status, placement, self._metrics.shards.latest, self._model)
        return Snapshot(replace(group, why=short_text(why)) if why else group, self._requests(),
                        holder_map(epoch.placement) if epoch else None, load_map(placement.load) if placement else None)

    def _requests(self) -> RequestsView:
        requests, load, now_s = self._metrics.requests, self._load(), self._wall_clock()
        rates = self._window.add(Totals(now_s, requests.num_generated_tokens, tuple(requests.first_token.counts),
                                        tuple(requests.inter_token.counts)))
        return RequestsView(now_s, load.num_held, load.num_decoding, load.num_waiting_tokens, rates)


def group_view(status: ClusterStatus, placement: PlacementStatus | None, loads: Loads, model: str) -> GroupView:
    """Return the group as the page shows it. `placement`: of the same epoch; None: not told yet."""
    view, epoch = status.view, status.view.epoch
    ratios = placement.ratios if placement else ()
    straggler = find_straggler(ratios)
    figures = epoch.figures if epoch else None
    ordered = sorted(status.shards, key=lambda entry: _order(epoch, entry[0].shard_id))
    return GroupView(
        model, version("moesaic"), status.health, short_text(view.why),
        epoch.number if epoch else 0, epoch.revision if epoch else 0, view.next.revision if view.next else None,
        figures.step_s if figures else None, figures.bound_s if figures else None,
        epoch.members[straggler.rank].shard_id if epoch and straggler else "", straggler.reason if straggler else "",
        len(ordered), tuple(_member(one, shard, view, ratios, loads) for one, shard in ordered[:MAX_MEMBERS]),
        tuple(RouterView(router.router_id, router.node_name, router.http_address, router.is_ready, router.epoch_number)
              for router in status.routers[:MAX_MEMBERS]),
        (*map(_membership_change, status.membership_changes),
         *(_placement_change(epoch, change) for change in (epoch.changes if epoch else ()))))


def _of_epoch(placement: PlacementStatus | None, epoch: Epoch | None) -> PlacementStatus | None:
    """Return it, unless it is of other members than those that are shown."""
    is_same = placement is not None and epoch is not None and placement.epoch.number == epoch.number
    return placement if is_same else None


def _order(epoch: Epoch | None, shard_id: str) -> tuple[int, str]:
    rank = epoch.rank_of(shard_id) if epoch else None
    return (len(epoch.members) if epoch else 0) if rank is None else rank, shard_id


def _member(one: Member, shard: ShardStatus, view: View, ratios: Sequence[WorkRatio | None],
            loads: Loads) -> MemberView:
    epoch = view.epoch
    rank = epoch.rank_of(one.shard_id) if epoch else None
    ratio = ratios[rank] if rank is not None and ratios else None
    load = loads.get((one.shard_id, one.pool))
    kv_part = 1 - shard.kv_blocks_free / shard.kv_blocks_total if shard.kv_blocks_total else None
    return MemberView(
        one.shard_id, rank, one.node_name, one.pool, one.facts.device_name, shard.state,
        shard.is_leaving or one.shard_id in view.leaving, shard.resident_bytes, one.facts.memory_budget_bytes,
        shard.weights_bytes, shard.kv_cache_bytes, kv_part, shard.num_running, shard.num_waiting,
        epoch.shares[rank].fraction if epoch and rank is not None else 0.0, shard.num_expert_copies,
        load.tokens_per_s if load else None, load.step_s if load else None, ratio.own if ratio else None,
        ratio.experts if ratio else None, one.profile.emulated_speed if one.profile else None,
        short_text(shard.detail))


def _membership_change(change: MembershipChange) -> ChangeView:
    steps = [f"{name} {value:,.0f} ms" for name, value in (
        ("detected", change.detected_ms), ("regrouped", change.regrouped_ms), ("loaded", change.loaded_ms),
        ("resumed", change.resumed_ms)) if value is not None]
    who = f" {', '.join(change.shard_ids)}" if change.shard_ids and change.cause != "start" else ""
    text = f"epoch {change.epoch_before} → {change.epoch_after or '?'}: {change.cause}{who}"
    return ChangeView(f"members {change.at_s} {change.cause}", "members", change.at_s,
                      short_text(f"{text} ({', '.join(steps)})" if steps else text))


def _placement_change(epoch: Epoch | None, change: PlacementChange) -> ChangeView:
    number = epoch.number if epoch else 0
    revisions = f"revision {change.first_revision} → {change.last_revision}"
    moved = f"{change.moved_bytes / 2**20:,.1f} MiB moved"
    detail = f": {change.detail}" if change.detail else ""
    return ChangeView(f"placement {number} {change.operation_id}", "placement", None,
                      short_text(f"{revisions}: {change.why}, {moved}, {change.state}{detail}"))
