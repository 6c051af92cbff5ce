"""The doors, HTTP and gRPC, and the one table from errors to their statuses.

May import: router, text, engine, proto.
"""
