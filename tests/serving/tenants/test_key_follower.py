"""A ring follows its database, and keeps what it has while that is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.errors import UnauthorizedError
from serving.supervision import owned_tasks
from serving.tenants import key_follower
from serving.tenants.database import open_database
from serving.tenants.key import Scope
from serving.tenants.key_follower import POLL_S, KeyFollower
from serving.tenants.key_ring import KeyRing
from serving.tenants.key_store import KeyStore
from tests.serving.tenants.keys import new_key


async def test_a_ring_follows_and_survives_an_outage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = open_database(f"sqlite:///{tmp_path}/tenants.db")
    store, ring, (key, secret) = KeyStore(engine), KeyRing(lambda: 1500.0), new_key()
    with ThreadPoolExecutor(1) as thread:
        follower = KeyFollower(store, ring, thread)
        await follower.follow()
        store.add(key)
        await follower.follow()
        assert ring.check(f"Bearer {secret}", Scope.INFER) == key
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE keys RENAME TO gone")
            connection.exec_driver_sql("UPDATE key_changes SET number = 77")
        await follower.follow()
        await follower.follow()
        assert ring.check(f"Bearer {secret}", Scope.INFER) == key
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO keys")
        store.revoke(key.key_id, 1400.0)
        await follower.follow()
        with pytest.raises(UnauthorizedError, match="revoked"):
            ring.check(f"Bearer {secret}", Scope.INFER)
    engine.dispose()
    assert caplog.text.count("keys_unread") == 1 and secret[-43:] not in caplog.text


async def test_all_routers_follow_a_change_at_their_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert POLL_S <= 2.5        # within 5 s, a slow database included
    monkeypatch.setattr(key_follower, "POLL_S", 0.01)
    engine, (key, secret) = open_database(f"sqlite:///{tmp_path}/tenants.db"), new_key()
    store, rings = KeyStore(engine), [KeyRing(lambda: 1500.0) for _ in range(3)]

    def num_open() -> int:
        found = 0
        for ring in rings:
            with contextlib.suppress(UnauthorizedError):
                found += ring.check(f"Bearer {secret}", Scope.INFER) == key
        return found

    with ThreadPoolExecutor(3) as threads:
        async with owned_tasks(**{f"ring{index}": KeyFollower(store, ring, threads).run()
                                  for index, ring in enumerate(rings)}), asyncio.timeout(60):
            for change, wanted in ((lambda: store.add(key), 3), (lambda: store.revoke(key.key_id, 1400.0), 0)):
                change()
                while num_open() != wanted:     # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    engine.dispose()
