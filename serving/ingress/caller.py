"""Who asks, and under which id."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypeGuard
from uuid import uuid4

from serving.ingress.auth import choose_tenant
from serving.tenants.key import Key, Tenant

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Caller:
    request_id: str
    key: Key | None             # None: no keys are needed
    traceparent: str = ""       # W3C header of the trace that the request is part of, as it came

    def tenant(self, user: str | None) -> Tenant:
        return choose_tenant(self.key, user)

    @property
    def owner(self) -> str:
        """Return whose is what is kept for this caller: the tenant of the key, or empty without one."""
        return "" if self.key is None else self.key.tenant

    def under(self, request_id: str | None) -> Caller:
        """Return the same caller under the id that a body gives, where it gives one that can stand in a log line."""
        return replace(self, request_id=request_id) if is_request_id(request_id) else self


@dataclass(frozen=True, slots=True)
class Stamp:
    """Values that every object of one answer carries."""

    id: str
    created_s: int              # Unix time
    fingerprint: str


def is_request_id(given: str | None) -> TypeGuard[str]:
    """Return whether it can stand in a log line."""
    return given is not None and _REQUEST_ID.fullmatch(given) is not None


def choose_request_id(given: str | None) -> str:
    """Return the client's id, if it can stand in a log line; else a new one."""
    return given if is_request_id(given) else uuid4().hex
