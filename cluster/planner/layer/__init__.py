"""One MoE layer: the problem, exact and quick solvers, spare copies. Pure. May import: nothing of cluster."""
