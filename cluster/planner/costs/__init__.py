"""The costs of a step, from profiles and a workload, and its predicted time. Pure. May import: planner.layer."""
