"""Keys open the door, and name the tenant."""

from __future__ import annotations

import pytest

from serving.errors import UnauthorizedError
from serving.ingress.auth import choose_tenant, tenant_of_header

KEYS = ("alpha", "beta")


def test_each_key_is_a_tenant_that_does_not_show_it() -> None:
    tenants = {tenant_of_header(f"Bearer {key}", KEYS) for key in KEYS}
    assert len(tenants) == 2 and not any(key in str(tenant) for tenant in tenants for key in KEYS)


@pytest.mark.parametrize("header", [None, "", "alpha", "Basic alpha", "Bearer", "Bearer gamma", "Bearer é"])
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        tenant_of_header(header, KEYS)


def test_without_keys_the_client_names_its_tenant() -> None:
    assert tenant_of_header(None, ()) is None
    assert choose_tenant(None, "ada") == "ada" and choose_tenant(None, None) == "default"
    assert choose_tenant("key-1", "ada") == "key-1"
