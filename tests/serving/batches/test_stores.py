"""A router's part of the database of files sweeps, also when the database has not answered for a while."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from serving.batches import stores
from serving.batches.stored_file import Purpose, new_file
from serving.batches.stores import BatchStores
from serving.config import BatchConfig
from serving.tenants.database import open_database


async def test_what_has_expired_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SWEEP_S", 0.0)
    engine = open_database(f"sqlite:///{tmp_path}/tenants.db")
    opened = BatchStores(engine, "router", BatchConfig(keep_days=2))
    assert opened.keep_s == 2 * 86400
    file = new_file("", "old", Purpose.BATCH, 0.0, 1.0)
    opened.files.begin(file)
    opened.files.append(file, 0, b"x")
    sweep, num_silent = opened.files.sweep, 1

    def sweep_later(now_s: float) -> int:
        nonlocal num_silent
        num_silent -= 1
        if num_silent >= 0:
            raise OperationalError("DELETE", {}, Exception("no route"))
        return sweep(now_s)
    monkeypatch.setattr(opened.files, "sweep", sweep_later)
    running = asyncio.create_task(opened.run())
    async with asyncio.timeout(60):
        while await opened.thread.call(lambda: opened.files.chunks(file.file_id, 0, 1)):
            pass
    running.cancel()
    await opened.close()
    engine.dispose()
