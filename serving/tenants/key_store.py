"""Keys in the database: made, listed and revoked by the command line, read by routers. Calls wait for the database."""

from __future__ import annotations

import dataclasses

from sqlalchemy import Engine, RowMapping, insert, select, update

from serving.priority import DEFAULT_WEIGHT
from serving.tenants.database import reading
from serving.tenants.key import Key, Limits, scopes_of
from serving.tenants.schema import KEY_CHANGES, KEYS

_LIMITS = tuple(field.name for field in dataclasses.fields(Limits))


class KeyStore:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, key: Key) -> None:
        """Keep a new key. All keys of its tenant have its weight from now on."""
        row: dict[str, object] = {column.name: getattr(key, column.name) for column in KEYS.columns
                                  if column.name not in _LIMITS}
        row |= dataclasses.asdict(key.limits) | {"scopes": sorted(key.scopes), "models": sorted(key.models)}
        with self._engine.begin() as connection:
            connection.execute(insert(KEYS).values(row))
            connection.execute(update(KEYS).values(weight=key.weight).where(KEYS.c.tenant == key.tenant))
            connection.execute(update(KEY_CHANGES).values(number=KEY_CHANGES.c.number + 1))

    def all(self) -> list[Key]:
        """Return all keys, the oldest first, revoked and expired ones too."""
        with reading(self._engine) as connection:
            return [_to_key(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.created_s)).mappings()]

    def weight_of(self, tenant: str) -> int:
        """Return the weight of a tenant; of one without keys, the default."""
        with reading(self._engine) as connection:
            found = connection.execute(select(KEYS.c.weight).where(KEYS.c.tenant == tenant).limit(1)).scalar()
        return DEFAULT_WEIGHT if found is None else int(found)

    def revoke(self, key_id: str, now_s: float) -> bool:
        """Return whether there was a key of that id that had not been revoked."""
        with self._engine.begin() as connection:
            done = connection.execute(update(KEYS).values(revoked_s=now_s).where(
                KEYS.c.key_id == key_id, KEYS.c.revoked_s.is_(None)))
            connection.execute(update(KEY_CHANGES).values(number=KEY_CHANGES.c.number + 1))
            return done.rowcount > 0

    def num_changes(self) -> int:
        """Return a number that is another one after each change."""
        with reading(self._engine) as connection:
            return int(connection.execute(select(KEY_CHANGES.c.number)).scalar_one())


def _to_key(row: RowMapping) -> Key:
    return Key(key_id=row["key_id"], name=row["name"], tenant=row["tenant"], secret_hash=bytes(row["secret_hash"]),
               scopes=scopes_of(row["scopes"]), limits=Limits(**{name: row[name] for name in _LIMITS}),
               priority=row["priority"], models=frozenset(row["models"]), created_s=row["created_s"],
               expires_s=row["expires_s"], revoked_s=row["revoked_s"], weight=row["weight"])
