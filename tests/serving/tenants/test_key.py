"""What a key's text says, and what a key allows."""

from __future__ import annotations

import pytest

from serving.tenants.key import NAME_PATTERN, Scope, hash_of, id_in, new_secret
from tests.serving.tenants.keys import new_key


def test_a_text_leads_to_its_key_and_is_not_kept() -> None:
    key, secret = new_key()
    assert id_in(secret) == key.key_id and hash_of(secret) == key.secret_hash
    assert secret not in repr(key) and secret[-43:] not in repr(key)
    assert len({new_secret() for _ in range(100)}) == 100


@pytest.mark.parametrize("text", ["", "sk-moesaic-", "sk-moesaic-0123456789ab-short", "sk-" + "x" * 60, "é"])
def test_other_texts_name_no_key(text: str) -> None:
    assert id_in(text) is None


def test_admin_may_what_others_may() -> None:
    key, _ = new_key(scopes=frozenset({Scope.STATUS}))
    assert key.allows(Scope.STATUS) and not key.allows(Scope.INFER) and not key.allows(Scope.ADMIN)
    admin, _ = new_key(scopes=frozenset({Scope.ADMIN}))
    assert all(admin.allows(scope) for scope in Scope)


def test_a_key_ends_at_its_time() -> None:
    key, _ = new_key(expires_s=2000.0)
    assert key.is_valid(1999.0) and not key.is_valid(2000.0)


@pytest.mark.parametrize("name", ["a b", "-a", "", "x" * 65, "a\n"])
def test_names_can_stand_in_a_log_line(name: str) -> None:
    assert not NAME_PATTERN.fullmatch(name) and NAME_PATTERN.fullmatch("ada.l@example-1")
