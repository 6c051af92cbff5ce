"""Keys come back as they were added, and are revoked once."""

from __future__ import annotations

from sqlalchemy import Engine

from serving.tenants.key import Limits, Scope
from serving.tenants.key_store import KeyStore
from tests.serving.tenants.keys import new_key

LIMITS = Limits(1, 2, 3, 4_000_000_000_000, 5, 6)


def test_keys_come_back_as_they_were(engine: Engine) -> None:
    store = KeyStore(engine)
    plain, _ = new_key()
    full, _ = new_key("b", "t", frozenset({Scope.ADMIN, Scope.STATUS}), LIMITS, frozenset({"m"}), 1.5e9)
    store.add(plain)
    store.add(full)
    assert store.all() == [plain, full]


def test_a_key_is_revoked_once_and_every_change_is_seen(engine: Engine) -> None:
    store, (key, _) = KeyStore(engine), new_key()
    numbers = [store.num_changes()]
    store.add(key)
    numbers.append(store.num_changes())
    assert store.revoke(key.key_id, 1234.5) and not store.revoke(key.key_id, 2000.0) and not store.revoke("no", 1.0)
    numbers.append(store.num_changes())
    assert len(set(numbers)) == 3 and store.all()[0].revoked_s == 1234.5 and not store.all()[0].is_valid(2000.0)
