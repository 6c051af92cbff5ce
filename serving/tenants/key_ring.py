"""The keys that a router knows, and the one check of a client's: both doors ask here. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable

from serving.errors import ForbiddenError, NotReadyError, UnauthorizedError
from serving.tenants.key import Key, Scope, hash_of, id_in

_SCHEME = "bearer "
_NO_HASH = bytes(32)        # no key's: nothing is known that hashes to it


class KeyRing:
    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is Unix time."""
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._is_read = False           # the database, ever

    def set_keys(self, keys: Iterable[Key]) -> None:
        """Know these from now on, and no others."""
        self._keys = {key.key_id: key for key in keys}
        self._is_read = True

    def of_id(self, key_id: str) -> Key:
        """Return a key that may ask now. Raises UnauthorizedError; NotReadyError before any keys were read."""
        if not self._is_read:
            raise NotReadyError("no keys were read yet", fix="try again soon")
        key = self._keys.get(key_id)
        if key is None or not key.is_valid(self._clock()):
            raise UnauthorizedError("the API key of this batch is revoked or expired", fix="use another one")
        return key

    def check(self, authorization: str | None, scope: Scope) -> Key:
        """Return the key of a header `Authorization: Bearer KEY`.

        Raises UnauthorizedError, which does not tell whether a key's id exists; ForbiddenError for a key that is not
        for this.
        """
        if authorization is None or not authorization.lower().startswith(_SCHEME):
            raise UnauthorizedError("no API key was given", fix="send the header Authorization: Bearer YOUR_KEY")
        given = authorization[len(_SCHEME):].strip()
        key = self._keys.get(id_in(given) or "")
        # Compared whether or not there is such a key, so that the time that it takes says nothing.
        is_right = hmac.compare_digest(hash_of(given), key.secret_hash if key else _NO_HASH)
        if key is None or not is_right:
            raise UnauthorizedError("the API key is wrong", fix="use a key that `moesaic keys create` has printed")
        if not key.is_valid(self._clock()):
            why = "revoked" if key.revoked_s is not None else "expired"
            raise UnauthorizedError(f"the API key {key.name!r} is {why}", fix="ask for a new one")
        if not key.allows(scope):
            raise ForbiddenError(f"the API key {key.name!r} is not for this: it lacks the scope {scope.value!r}",
                                 fix=f"use a key with it: moesaic keys create --scope {scope.value}")
        return key
