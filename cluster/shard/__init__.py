"""The life of one member: register, load, serve one epoch after the other.

May import: coordinator, planner, planner.costs, planner.layer, device.
"""
