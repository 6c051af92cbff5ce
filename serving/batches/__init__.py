"""Files of tenants, and batches of requests in them, in the database that all routers share.

May import: tenants.
"""
