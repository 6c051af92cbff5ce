"""Who may ask, and how much: keys, limits and what was used, in a database that all routers share.

May import: nothing of serving.
"""
