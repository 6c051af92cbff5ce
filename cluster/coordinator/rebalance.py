"""Decides when the coordinator looks for a faster placement by itself, and whether it takes what it found. Pure."""

from __future__ import annotations

from cluster.coordinator.placement_change import find, running_change
from cluster.coordinator.view import GroupPhase, View
from cluster.planner.plan_rules import BestChange, PlanRules, lacks_copies
from serving.link.epoch import Epoch


def epoch_to_rebalance(view: View, rules: PlanRules, num_rows: float, num_rows_considered: float) -> Epoch | None:
    """Return the epoch whose placement is worth a look. `num_rows`: counted by now, and by the last look.

    None over a placement that somebody gave, while a change runs or members leave, and when the same change has failed.
    """
    epoch, config = view.epoch, rules.config
    if config.rebalance_margin is None or config.policy != "speed" or epoch is None or view.leaving:
        return None
    if view.phase is not GroupPhase.READY or running_change(epoch) or find(epoch, rebalance_id(epoch)):
        return None
    if lacks_copies(epoch, rules):          # the next one to die would be waited for
        return epoch
    is_given = epoch.figures is not None and epoch.figures.solver == "given"
    return None if is_given or num_rows <= num_rows_considered else epoch


def rebalance_id(epoch: Epoch) -> str:
    """Return the name of the change that starts from this revision, the same from every look at it."""
    return f"auto-{epoch.number}-{epoch.revision}"


def why_worth_taking(best: BestChange, margin: float | None) -> str | None:
    """Return how much faster a step becomes, or what else is better; None when it is not worth a change."""
    planned = best.target.figures
    if planned is None or margin is None:
        return None
    if best.restores_copies:
        return "every expert gets its copies again"
    gain = best.running_s / planned.step_s - 1.0
    return f"{gain:.0%} faster" if gain >= margin else None
