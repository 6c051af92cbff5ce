"""The tables, as the newest migration leaves them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

METADATA = MetaData()
_IS_OPEN = text("outcome IS NULL")

KEYS = Table(
    "keys", METADATA,
    Column("key_id", String(12), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("secret_hash", LargeBinary(32), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("models", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("weight", Integer, nullable=False, server_default="1"),      # all keys of a tenant have the same
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    Column("tokens_per_month", BigInteger),
    Column("concurrent_requests", BigInteger),
    Column("max_tokens", BigInteger),
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double),
    Column("revoked_s", Double))

# One row. Routers read all keys again when the number is another one.
KEY_CHANGES = Table(
    "key_changes", METADATA,
    Column("number", BigInteger, nullable=False))

# One row for each request of a client, written before it is computed. `outcome` is None while it is open.
REQUESTS = Table(
    "requests", METADATA,
    Column("usage_id", String(32), primary_key=True),       # ours: a client may send one id twice
    Column("request_id", String(160), nullable=False),      # as logs and the client have it
    Column("router_id", String(32), nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("model", String(256), nullable=False),
    Column("day", Integer, nullable=False),                 # of its arrival: number since 1970, UTC
    Column("arrived_s", Double, nullable=False),
    Column("first_token_s", Double),
    Column("ended_s", Double),
    Column("num_held", BigInteger, nullable=False),         # tokens in the budgets: reserved, then used
    Column("num_charged", BigInteger, nullable=False),      # for the rate
    Column("num_prompt", BigInteger, nullable=False),       # 0 until the first token came
    Column("num_cached", BigInteger, nullable=False),       # of the prompt
    Column("num_generated", BigInteger, nullable=False),
    Column("num_reasoning", BigInteger, nullable=False),    # of the generated
    Column("outcome", String(16)),
    Index("requests_of_days", "day", "tenant"),
    Index("open_requests", "router_id", sqlite_where=_IS_OPEN, postgresql_where=_IS_OPEN))

# How much each key has used of its limits: serving/tenants/standing.py.
STANDINGS = Table(
    "standings", METADATA,
    Column("key_id", String(12), primary_key=True),
    Column("slot", BigInteger, nullable=False),
    Column("slot_requests", JSON, nullable=False),
    Column("slot_tokens", JSON, nullable=False),
    Column("day", Integer, nullable=False),
    Column("day_tokens", BigInteger, nullable=False),
    Column("month", Integer, nullable=False),
    Column("month_tokens", BigInteger, nullable=False),
    Column("num_open", Integer, nullable=False))

# Routers that live say so; the open requests of one that does not any more are ended by the others.
ROUTERS = Table(
    "routers", METADATA,
    Column("router_id", String(32), primary_key=True),
    Column("seen_s", Double, nullable=False))

# Of each tenant the newest, with the conversations that they end: serving/tenants/kept_responses.py.
RESPONSES = Table(
    "responses", METADATA,
    Column("tenant", String(64), primary_key=True),
    Column("response_id", String(160), primary_key=True),
    Column("kept_s", Double, nullable=False),
    Column("num_characters", BigInteger, nullable=False),
    Column("content", Text, nullable=False),
    Index("responses_by_age", "kept_s"))

# What was used on days whose requests are not kept one by one any more: serving/tenants/usage_archive.py.
USAGE_DAYS = Table(
    "usage_days", METADATA,
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("key_id", String(12), primary_key=True),
    Column("tenant", String(64), primary_key=True),
    Column("num_requests", BigInteger, nullable=False),
    Column("num_prompt", BigInteger, nullable=False),
    Column("num_cached", BigInteger, nullable=False),
    Column("num_generated", BigInteger, nullable=False),
    Column("num_reasoning", BigInteger, nullable=False))

# Batches of requests in a file: serving/batches. One that is validated belongs to a router meanwhile.
BATCHES = Table(
    "batches", METADATA,
    Column("batch_id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("key_id", String(12)),                           # that its requests are counted for
    Column("endpoint", String(32), nullable=False),
    Column("input_file_id", String(32), nullable=False),
    Column("output_file_id", String(32), nullable=False),
    Column("error_file_id", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("labels", JSON, nullable=False),                 # the client's metadata
    Column("times_s", JSON, nullable=False),                # of each status that it has had
    Column("errors", JSON, nullable=False),
    Column("model", String(256)),
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double, nullable=False),
    Column("num_total", Integer, nullable=False),
    Column("num_completed", Integer, nullable=False),
    Column("num_failed", Integer, nullable=False),
    Column("num_prompt", BigInteger, nullable=False),
    Column("num_cached", BigInteger, nullable=False),
    Column("num_generated", BigInteger, nullable=False),
    Column("num_reasoning", BigInteger, nullable=False),
    Column("router_id", String(32)),                        # that validates it
    Column("taken_s", Double, nullable=False),              # when a line was last taken: batches take turns
    Column("retry_s", Double, nullable=False),              # no line is taken before
    Index("batches_of_tenants", "tenant", "created_s"))

# Lines of batches. One without an outcome is taken by a router, and by another when that does not live any more.
BATCH_LINES = Table(
    "batch_lines", METADATA,
    Column("batch_id", String(32), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", String(512), nullable=False),
    Column("first_byte", BigInteger, nullable=False),       # in the input file
    Column("num_bytes", Integer, nullable=False),
    Column("router_id", String(32)),
    Column("num_tries", Integer, nullable=False),           # that have failed
    Column("outcome", String(16)),
    Index("open_lines", "batch_id", "number", sqlite_where=_IS_OPEN, postgresql_where=_IS_OPEN))

# Files of tenants: serving/batches. `num_bytes` grows with the chunks; a file is shown once it is complete.
FILES = Table(
    "files", METADATA,
    Column("file_id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),           # empty: whoever has no key, where none is needed
    Column("filename", String(255), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double, nullable=False),
    Column("is_complete", Boolean, nullable=False),
    Index("files_of_tenants", "tenant", "created_s"))

FILE_CHUNKS = Table(
    "file_chunks", METADATA,
    Column("file_id", String(32), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content", LargeBinary, nullable=False))
