"""The orders to leave that members were given: by name, or because their pool is to have fewer."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace

from cluster.coordinator.leaving import Drain, check_others_suffice, find_leaving, progress
from cluster.coordinator.reports import Report
from cluster.coordinator.view import LeaveOrder, View
from cluster.planner.plan_rules import PlanRules

logger = logging.getLogger(__name__)

NUM_DONE_KEPT = 8       # orders of members that are gone, for who still asks how far they are


class LeaveOrders:
    """Remembers them by operation id. Who leaves says so itself from then on; members remember the orders, too."""

    def __init__(self, rules: PlanRules) -> None:
        self._rules = rules
        self._orders: dict[str, LeaveOrder] = {}

    def drain(self, target: str, operation_id: str, view: View, reports: Mapping[str, Report]) -> None:
        """Let a shard, or all of a node, leave; the same id twice is one order. Raises PlacementError."""
        if operation_id in self._orders:
            return
        shard_ids = find_leaving(target, (report.member for report in reports.values()))
        if view.epoch is not None:
            check_others_suffice(view.epoch, {*view.leaving, *shard_ids}, self._rules)
        self._orders[operation_id] = LeaveOrder(operation_id, target, shard_ids)
        logger.info("drain_begun operation_id=%s shard_ids=%s", operation_id, ",".join(shard_ids))

    def shrink(self, pool: str, shard_ids: tuple[str, ...]) -> None:
        """Let these leave a pool that is to have fewer."""
        if shard_ids:
            operation_id = f"scale-{secrets.token_hex(4)}"
            self._orders[operation_id] = LeaveOrder(operation_id, pool, shard_ids)
            logger.info("pool_shrinks pool=%s shard_ids=%s", pool, ",".join(shard_ids))

    def adopt(self, orders: Iterable[LeaveOrder]) -> None:
        """Go on with those of the coordinator before."""
        self._orders = {order.operation_id: order for order in orders} | self._orders

    def remembered(self, reports: Mapping[str, Report]) -> tuple[LeaveOrder, ...]:
        """Return those that another coordinator is to know of: of shards that are here, and the latest."""
        orders = list(self._orders.values())
        return tuple(order for index, order in enumerate(orders) if index >= len(orders) - NUM_DONE_KEPT
                     or any(shard_id in reports for shard_id in order.shard_ids))

    def progress(self, operation_id: str, view: View, reports: Mapping[str, Report]) -> Drain:
        return progress(self._orders[operation_id], view, reports)

    def with_order(self, report: Report) -> Report:
        """Return a report that says it when the shard was told here to leave: it may have yet to learn that."""
        is_told = any(report.member.shard_id in order.shard_ids for order in self._orders.values())
        return replace(report, status=replace(report.status, is_leaving=True)) if is_told else report
