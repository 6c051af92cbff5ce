"""Serve /usage: what was used, as `moesaic usage` adds it up, for keys that may know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serving.config import PriceConfig
from serving.errors import ForbiddenError
from serving.ingress.build_request import check
from serving.tenants.days import text_of_day
from serving.tenants.key import Key, Scope
from serving.tenants.usage_by import UsageBy, days_between
from serving.tenants.usage_reader import UsageReader

Day = Annotated[str, Field(max_length=10, description="as 2026-11-28, UTC")]


class UsageQuery(BaseModel):
    """What may stand behind the `?`. Without `tenant` an admin's key is shown all, another key its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: Annotated[UsageBy, WithJsonSchema({"type": "string", "enum": list(UsageBy)})] = UsageBy.TENANT
    since: Day | None = None        # the first day; else all that is known
    until: Day | None = None        # the last day; else today
    tenant: Annotated[str, Field(max_length=64)] | None = None


class UsageRow(BaseModel):
    """Has the tenant, the key and its name, or the day as a field more, and with prices `cost_` and the currency."""

    model_config = ConfigDict(frozen=True, extra="allow")
    requests: int
    open: int                       # of them: without their tokens, until they have ended
    prompt_tokens: int
    cached_tokens: int              # of the prompt's
    generated_tokens: int
    reasoning_tokens: int           # of the generated


class UsageReport(BaseModel):
    model_config = ConfigDict(frozen=True)
    object: Literal["list"] = "list"
    by: UsageBy
    since: Day
    until: Day
    data: list[UsageRow]


class UsageEndpoint:
    def __init__(self, reader: UsageReader, prices: PriceConfig | None, clock: Callable[[], float]) -> None:
        """`clock` is Unix time."""
        self._reader = reader
        self._prices = prices
        self._clock = clock

    async def report(self, query: Mapping[str, str], key: Key) -> UsageReport:
        """Return what the key may know. Raises InvalidRequestError, ForbiddenError, NotReadyError."""
        asked = check(UsageQuery, query)
        days = days_between(asked.since, asked.until, self._clock())
        usages = await self._reader.read(asked.by, days, _tenant_for(key, asked.tenant))
        return UsageReport(by=asked.by, since=text_of_day(days[0]), until=text_of_day(days[1]), data=[
            UsageRow.model_validate(usage.row(asked.by, self._prices)) for usage in usages])


def _tenant_for(key: Key, asked: str | None) -> str | None:
    """Return whose usage it is, None for that of all."""
    if Scope.ADMIN in key.scopes:
        return asked
    if asked not in (None, key.tenant):
        raise ForbiddenError(f"the API key {key.name!r} may see the usage of its own tenant only", param="tenant",
                             fix="leave tenant out, or use a key with the scope admin: "
                                 "moesaic keys create --scope admin")
    return key.tenant
