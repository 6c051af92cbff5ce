"""Certificates of doors and links: read, judged, read again when they are renewed, and shown to ssl and gRPC.

May import: nothing of serving.
"""
