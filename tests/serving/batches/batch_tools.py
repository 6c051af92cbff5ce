"""Batches as tests need them: stores of several routers on one database, and lines that say what is to come of them."""

from __future__ import annotations

from sqlalchemy import Engine

from serving.batches.batch import WINDOW_S, Batch, LineEntry, new_batch_id
from serving.batches.stored_file import CHUNK_BYTES, Purpose, new_file
from serving.batches.stores import BatchStores
from serving.config import BatchConfig
from serving.tenants.ledger import Ledger

NOW_S = 1000.0
KEEP_S = 86400.0


def stores_of(engine: Engine, router_id: str = "one", now_s: float = NOW_S, **options: int) -> BatchStores:
    """Return the stores of a router that lives."""
    Ledger(engine, router_id).beat(now_s, [])
    return BatchStores(engine, router_id, BatchConfig.model_validate(options))


def new_batch(stores: BatchStores, *lines: str, tenant: str = "team", now_s: float = NOW_S) -> Batch:
    """Upload a file of these lines and begin a batch."""
    file, content = new_file(tenant, "in.jsonl", Purpose.BATCH, now_s, KEEP_S), "\n".join(lines).encode()
    stores.files.begin(file)
    for number in range(-(-len(content) // CHUNK_BYTES)):
        stores.files.append(file, number, content[number * CHUNK_BYTES:(number + 1) * CHUNK_BYTES])
    stores.files.complete(file, now_s + KEEP_S)
    outputs = [new_file(tenant, name, Purpose.BATCH_OUTPUT, now_s, KEEP_S) for name in ("output", "error")]
    batch = Batch(new_batch_id(), tenant, None, "/v1/completions", file.file_id, outputs[0].file_id, outputs[1].file_id,
                  now_s, now_s + WINDOW_S, {"a": "b"})
    stores.batches.create(batch, (outputs[0], outputs[1]))
    return batch


def running_batch(stores: BatchStores, *lines: str, tenant: str = "team", now_s: float = NOW_S) -> Batch:
    """Begin a batch whose lines may be taken."""
    batch = new_batch(stores, *lines, tenant=tenant, now_s=now_s)
    assert stores.batches.take_for_validation(stores.router_id, now_s) == batch
    at, entries = 0, []
    for number, line in enumerate(lines, 1):
        entries.append(LineEntry(number, f"id-{number}", at, len(line.encode())))
        at += len(line.encode()) + 1
    assert stores.batches.add_lines(batch.batch_id, stores.router_id, entries)
    assert stores.batches.validated(batch.batch_id, stores.router_id, "tiny", [], now_s)
    return stores.batches.get(tenant, batch.batch_id)


def end(stores: BatchStores, batch: Batch, now_s: float = NOW_S) -> Batch:
    """Take all steps that there are."""
    while stores.batches.advance(batch.batch_id, now_s):
        pass
    return stores.batches.get(batch.tenant, batch.batch_id)


def content_of(stores: BatchStores, file_id: str) -> bytes:
    return b"".join(chunk for _, chunk in stores.files.chunks(file_id, 0, 10_000))
