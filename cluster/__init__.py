"""Runs things where they are to run: the only importer of Ray. Beside the rooms stands what Ray Serve deploys.

May import: all of cluster.
"""
