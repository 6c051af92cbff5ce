"""`moesaic plan`: the question, the answer, and how it is shown.

May import: planner, planner.costs, planner.layer, device.
"""
