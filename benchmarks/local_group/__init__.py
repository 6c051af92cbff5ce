"""A whole group on this machine without Ray, for benchmarks and tests that kill, stop and start its processes.

Coordinator, shards and routers are those that Ray Serve runs, each in a process of its own, forked from one that has
imported everything: a shard is there in a tenth of a second.
"""
