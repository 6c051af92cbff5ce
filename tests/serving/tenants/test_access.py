"""A router's part of the database opens, follows and closes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serving.errors import UnauthorizedError
from serving.tenants.access import Access
from serving.tenants.database import open_database
from serving.tenants.key import Scope
from serving.tenants.key_store import KeyStore
from tests.deadlines import PATIENCE_S
from tests.serving.tenants.keys import new_key


async def test_keys_count_once_they_are_in_the_database(tmp_path: Path) -> None:
    url, (key, secret) = f"sqlite:///{tmp_path}/tenants.db", new_key()
    access = Access(url, "router", 90)
    with pytest.raises(UnauthorizedError):
        access.keys.check(f"Bearer {secret}", Scope.INFER)
    engine = open_database(url)
    KeyStore(engine).add(key)
    engine.dispose()
    running = asyncio.create_task(access.run())
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert access.keys.check(f"Bearer {secret}", Scope.INFER) == key
                break
            except UnauthorizedError:
                await asyncio.sleep(0.01)
    running.cancel()

    async def nothing() -> None:
        pass
    await access.close_after(nothing())
