"""How many replicas of each pool the load needs. Pure. May import: planner, planner.costs, planner.layer."""
