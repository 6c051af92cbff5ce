"""From a door to a shard: the service, admission, choice of shard, journal, links. May import: link, engine, text,
tenants, tracing, fair_queue, token_counters."""
