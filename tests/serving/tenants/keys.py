"""Keys as tests need them."""

from __future__ import annotations

from serving.priority import DEFAULT_PRIORITY
from serving.tenants.key import Key, Limits, Scope, hash_of, new_secret

NO_LIMITS = Limits()


def new_key(name: str = "app", tenant: str = "team", scopes: frozenset[Scope] = frozenset({Scope.INFER}),
            limits: Limits = NO_LIMITS, models: frozenset[str] = frozenset(), expires_s: float | None = None
            ) -> tuple[Key, str]:
    """Return a key and its text."""
    key_id, secret = new_secret()
    return Key(key_id, name, tenant, hash_of(secret), scopes, limits, DEFAULT_PRIORITY, models, 1000.0,
               expires_s), secret
