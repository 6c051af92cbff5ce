"""The stream between router and shard: both ends, messages, epochs. May import: engine, proto, tls."""
