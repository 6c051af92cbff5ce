"""The step loop of a shard: scheduler, KV blocks, requests. May import: nothing of serving."""
