"""Brings a service up and down, and talks to one that runs.

May import: app, http_proxy, coordinator, planner, device.
"""
