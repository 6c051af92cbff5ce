"""This device and this node: facts, profile, identity, checkpoints. May import: planner.costs."""
