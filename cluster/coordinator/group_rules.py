"""The rules by which a service's group is formed, from its checkpoint and config."""

from __future__ import annotations

from cluster.coordinator.client import REPEAT_S
from cluster.coordinator.group_size import group_size
from cluster.coordinator.membership import GroupRules
from cluster.planner.plan_rules import plan_rules
from model.args import ModelArgs
from serving.config import ServeConfig

LOST_AFTER_S = 3 * REPEAT_S
REPLACED_AFTER_S = 1.2 * REPEAT_S


def group_rules(args: ModelArgs, config: ServeConfig) -> GroupRules:
    return GroupRules(group_size(config), plan_rules(args, config), LOST_AFTER_S, REPLACED_AFTER_S)
