"""Shows `moesaic status --autoscaler`: what it wants, by what, what it waits for, and what it has changed."""

from __future__ import annotations

import time

from cluster.coordinator.view import ClusterStatus


def autoscaler_view(status: ClusterStatus) -> str:
    scaling = status.autoscaler
    if scaling is None:
        return "autoscaler: none; set `autoscaling` in the config, or wait until the group runs"
    wanted = ", ".join(f"{num} of pool {pool}" for pool, num in sorted(scaling.wanted.items()))
    lines = [f"autoscaler: wants {wanted}", f"backlog: {scaling.backlog_s:.2f} s",
             f"needed most: {scaling.kind}, {scaling.ratio:.0%} of what these can: {scaling.text}"]
    if scaling.waits_for:
        lines.append(f"waits for {scaling.waits_for}")
    for change in reversed(scaling.changes):
        when = time.strftime("%H:%M:%S", time.localtime(change.at_s))
        lines.append(f"{when} pool {change.pool} {change.before} -> {change.after}: {change.why}")
    return "\n".join(lines)
