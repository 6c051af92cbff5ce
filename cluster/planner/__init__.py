"""Profiles, memory, loads -> roles, slots, holders, shares, times. Pure. May import: planner.layer."""
