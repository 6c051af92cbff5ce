"""The step loop of a shard: scheduler, KV blocks, requests. May import: no other folder of serving."""
