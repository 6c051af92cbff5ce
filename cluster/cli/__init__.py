"""Holds the commands of `moesaic`, their tables and their progress.

May import: launch, whatif, whatif.trace, coordinator, shard, planner, planner.costs, planner.layer, device.
"""
