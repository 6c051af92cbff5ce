"""The step loop of a shard: scheduler, KV blocks, requests. May import: fair_queue, token_counters."""
