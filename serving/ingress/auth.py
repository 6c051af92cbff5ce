"""API keys: who may ask, and as which tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from serving.errors import UnauthorizedError

DEFAULT_TENANT = "default"
_SCHEME = "bearer "


def tenant_of_header(authorization: str | None, api_keys: Sequence[str]) -> str | None:
    """Check an `Authorization: Bearer KEY` value and return the key's tenant, or None when no keys are configured.

    The tenant is a digest, so that keys appear in no log or metric. Raises UnauthorizedError.
    """
    if not api_keys:
        return None
    if authorization is None or not authorization.lower().startswith(_SCHEME):
        raise UnauthorizedError("no API key was given", fix="send the header Authorization: Bearer YOUR_KEY")
    given = authorization[len(_SCHEME):].strip().encode()
    # Every key is compared, in constant time, so that timing tells nothing about them.
    matches = [hmac.compare_digest(given, key.encode()) for key in api_keys]
    if not any(matches):
        raise UnauthorizedError("the API key is wrong", fix="use one of the keys in the service's config")
    return "key-" + hashlib.sha256(given).hexdigest()[:12]


def choose_tenant(key_tenant: str | None, claimed: str | None) -> str:
    """Return the tenant: a key is proof, so it counts over what a client says of itself (`user`, `tenant`)."""
    return key_tenant or claimed or DEFAULT_TENANT
