"""The right key opens what it is for, and no other text does."""

from __future__ import annotations

import pytest

from serving.errors import ForbiddenError, NotReadyError, UnauthorizedError
from serving.tenants.key import Scope
from serving.tenants.key_ring import KeyRing
from tests.serving.tenants.keys import new_key


def test_the_right_key_is_found() -> None:
    ring, (key, secret) = KeyRing(lambda: 1500.0), new_key()
    ring.set_keys([key])
    assert ring.check(f"Bearer {secret}", Scope.INFER) is key and ring.check(f"bearer  {secret} ", Scope.INFER) is key
    with pytest.raises(ForbiddenError, match="'status'"):
        ring.check(f"Bearer {secret}", Scope.STATUS)
    ring.set_keys([])
    with pytest.raises(UnauthorizedError):
        ring.check(f"Bearer {secret}", Scope.INFER)


def test_anything_else_is_refused_in_the_same_words_and_not_repeated() -> None:
    ring, (key, secret) = KeyRing(lambda: 1500.0), new_key()
    ring.set_keys([key])
    other = new_key()[1]
    texts = set()
    for given in (other, secret[:-1] + ("A" if secret[-1] != "A" else "B"), "é", "", "sk-moesaic-"):
        with pytest.raises(UnauthorizedError) as caught:
            ring.check(f"Bearer {given}", Scope.INFER)
        texts.add(str(caught.value))
    assert len(texts) == 1 and key.key_id not in texts.pop()
    for header in (None, "", secret, f"Basic {secret}", "Bearer"):
        with pytest.raises(UnauthorizedError, match="no API key"):
            ring.check(header, Scope.INFER)


def test_expired_and_revoked_keys_say_so_to_their_owner() -> None:
    now_s = [1500.0]
    ring, (key, secret) = KeyRing(lambda: now_s[0]), new_key(expires_s=2000.0)
    ring.set_keys([key])
    ring.check(f"Bearer {secret}", Scope.INFER)
    now_s[0] = 2000.0
    with pytest.raises(UnauthorizedError, match="'app' is expired"):
        ring.check(f"Bearer {secret}", Scope.INFER)


def test_a_key_is_found_by_its_id_as_long_as_it_may_ask() -> None:
    now_s = [1500.0]
    ring, (key, _) = KeyRing(lambda: now_s[0]), new_key(expires_s=2000.0)
    with pytest.raises(NotReadyError):
        ring.of_id(key.key_id)
    ring.set_keys([key])
    assert ring.of_id(key.key_id) is key
    now_s[0] = 2000.0
    for key_id in (key.key_id, "none"):
        with pytest.raises(UnauthorizedError, match="revoked or expired"):
            ring.of_id(key_id)
