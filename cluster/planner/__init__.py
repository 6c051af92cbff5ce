"""Costs, memory, rules -> roles, slots, holders, shares, times. Pure. May import: planner.costs, planner.layer."""
