"""Carries messages between the processes of a group: shared memory on one machine, TCP between machines.

May import: errors.
"""
