"""An API key and what it allows. Pure.

A key is shown once, when it is made: `sk-moesaic-ID-SECRET`. The database has the id and a hash. The secret has 256
random bits, so a plain SHA-256 of it cannot be searched for.
"""

from __future__ import annotations

import enum
import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from serving.priority import DEFAULT_WEIGHT

_TEXT = re.compile(r"sk-moesaic-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")      # of keys and tenants: can stand in a log line


class Scope(enum.StrEnum):
    INFER = "infer"         # ask the model
    STATUS = "status"       # read metrics, and what its own tenant has used
    ADMIN = "admin"         # both, and what all tenants have used


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may use. None: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None           # prompt and generated; days and months are those of UTC
    tokens_per_month: int | None = None
    concurrent_requests: int | None = None
    max_tokens: int | None = None               # of one answer


@dataclass(frozen=True, slots=True)
class Key:
    key_id: str
    name: str
    tenant: str
    secret_hash: bytes
    scopes: frozenset[Scope]
    limits: Limits
    priority: int                               # the most urgent, which is the lowest, that it may ask for
    models: frozenset[str]                      # by served name; empty: all
    created_s: float                            # Unix time, as all here
    expires_s: float | None
    revoked_s: float | None = None
    weight: int = DEFAULT_WEIGHT                # of its tenant: all keys of one have the same

    def is_valid(self, now_s: float) -> bool:
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a request is counted for. `key` None: keys are not needed, and the name is what the client says."""

    name: str
    key: Key | None = None

    @property
    def weight(self) -> int:
        """Return how large its part is beside other tenants'."""
        return DEFAULT_WEIGHT if self.key is None else self.key.weight


def new_secret() -> tuple[str, str]:
    """Return a new key's id, and the text that its owner gets."""
    key_id = secrets.token_hex(6)
    return key_id, f"sk-moesaic-{key_id}-{secrets.token_urlsafe(32)}"


def hash_of(text: str) -> bytes:
    """Return what is kept of a key's text."""
    return hashlib.sha256(text.encode()).digest()


def id_in(text: str) -> str | None:
    """Return the id in a key's text; None when it cannot be a key of ours."""
    match = _TEXT.fullmatch(text)
    return match[1] if match else None


def scopes_of(names: Collection[str]) -> frozenset[Scope]:
    """Raises ValueError for a name that is no scope."""
    return frozenset(Scope(name) for name in names)
