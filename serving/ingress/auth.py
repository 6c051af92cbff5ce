"""Who asks: the key of a request, and the tenant that it is counted for. All doors ask here."""

from __future__ import annotations

from serving.tenants.key import Key, Scope, Tenant
from serving.tenants.key_ring import KeyRing

DEFAULT_TENANT = "default"


def key_of_headers(authorization: str | None, x_api_key: str | None, keys: KeyRing | None, scope: Scope) -> Key | None:
    """Return the key of `Authorization: Bearer KEY` (OpenAI's clients) or `X-Api-Key: KEY` (Anthropic's).

    None when no keys are needed. Raises UnauthorizedError, ForbiddenError.
    """
    if keys is None:
        return None
    return keys.check(f"Bearer {x_api_key}" if authorization is None and x_api_key else authorization, scope)


def choose_tenant(key: Key | None, claimed: str | None) -> Tenant:
    """Return the tenant: a key is proof, so it counts over what a client says of itself (`user`, `tenant`)."""
    return Tenant(key.tenant, key) if key else Tenant(claimed or DEFAULT_TENANT)
