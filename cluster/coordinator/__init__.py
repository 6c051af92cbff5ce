"""Observes the members, decides each epoch and each change of placement, tells everybody.

May import: autoscaler, planner, planner.costs, planner.layer.
"""
