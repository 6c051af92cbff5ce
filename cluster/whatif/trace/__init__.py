"""`moesaic plan --trace`: the autoscaler on a trace of requests, beside fixed sizes and Ray Serve's own policy.

May import: whatif, autoscaler, planner, planner.costs, planner.layer.
"""
