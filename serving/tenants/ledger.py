"""The book of requests: each is written before it is computed, and ended once, with what it used.

All that is pending is one transaction. It locks the standings of the keys concerned, in one order, so that routers
wait for each other and none sees half of a change; what to decide is in standing.py. Calls wait for the database.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, RowMapping, bindparam, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from serving.tenants.days import day_of
from serving.tenants.key import Key
from serving.tenants.minute_window import MinuteWindow
from serving.tenants.schema import REQUESTS, ROUTERS, STANDINGS
from serving.tenants.standing import Ask, Grant, Refusal, Spent, Standing, at, reserve, settle

LEASE_S = 30.0      # a router that was not seen for so long is gone


class Outcome(enum.StrEnum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"           # with its router; used is what that had told last


@dataclass(frozen=True, slots=True)
class Used:
    """The tokens of one request."""

    num_prompt: int = 0
    num_cached: int = 0         # of the prompt
    num_generated: int = 0
    num_reasoning: int = 0      # of the generated
    first_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + self.num_generated


NOTHING_USED = Used()


@dataclass(frozen=True, slots=True)
class Opening:
    usage_id: str
    request_id: str
    key: Key
    model: str
    ask: Ask
    now_s: float


@dataclass(frozen=True, slots=True)
class Ending:
    usage_id: str
    key_id: str
    outcome: Outcome
    used: Used
    now_s: float


@dataclass(frozen=True, slots=True)
class Opened:
    """The answer to an opening, and how the key stands then."""

    decision: Grant | Refusal
    standing: Standing


class Ledger:
    def __init__(self, engine: Engine, router_id: str) -> None:
        self._engine = engine
        self._router_id = router_id
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert

    def write(self, openings: Sequence[Opening], endings: Collection[Ending]) -> list[Opened]:
        """Do all of it or nothing. Writing it again changes nothing more: an id is opened and ended once."""
        with self._engine.begin() as connection:
            standings = self._lock({opening.key.key_id for opening in openings} | {end.key_id for end in endings},
                                   connection)
            self._end(endings, standings, connection)
            opened = self._open(openings, standings, connection)
            self._save(standings, connection)
        return opened

    def beat(self, now_s: float, progress: Iterable[tuple[str, Used]]) -> None:
        """Say that this router lives, and what its open requests, by usage id, have used so far."""
        rows = [{"of_id": usage_id} | _columns(used) for usage_id, used in progress]
        with self._engine.begin() as connection:
            connection.execute(self._insert(ROUTERS).values(router_id=self._router_id, seen_s=now_s)
                               .on_conflict_do_update(index_elements=["router_id"], set_={"seen_s": now_s}))
            if rows:
                connection.execute(update(REQUESTS).where(
                    REQUESTS.c.usage_id == bindparam("of_id"), REQUESTS.c.outcome.is_(None)), rows)

    def end_lost(self, now_s: float) -> int:
        """End the requests of routers that are gone, as far as they had come. Return how many they are."""
        with self._engine.begin() as connection:
            living = select(ROUTERS.c.router_id).where(ROUTERS.c.seen_s >= now_s - LEASE_S)
            found = connection.execute(select(REQUESTS).where(
                REQUESTS.c.outcome.is_(None), REQUESTS.c.router_id.not_in(living),
                REQUESTS.c.arrived_s < now_s - LEASE_S)).mappings().all()
            connection.execute(delete(ROUTERS).where(ROUTERS.c.seen_s < now_s - LEASE_S))
        endings = [Ending(row["usage_id"], row["key_id"], Outcome.LOST, _used(row), now_s) for row in found]
        if endings:
            self.write([], endings)
        return len(endings)

    def _lock(self, key_ids: Collection[str], connection: Connection) -> dict[str, Standing]:
        """Return the standings, which nobody else may change until the transaction ends."""
        if not key_ids:
            return {}
        new = [{"key_id": key_id} | _row_of(Standing()) for key_id in sorted(key_ids)]
        connection.execute(self._insert(STANDINGS).on_conflict_do_nothing(), new)
        rows = connection.execute(select(STANDINGS).where(STANDINGS.c.key_id.in_(key_ids))
                                  .order_by(STANDINGS.c.key_id).with_for_update()).mappings()
        return {row["key_id"]: _standing(row) for row in rows}

    def _open(self, openings: Sequence[Opening], standings: dict[str, Standing], connection: Connection
              ) -> list[Opened]:
        opened, rows = [], []
        for opening in openings:
            key = opening.key
            standing = at(standings[key.key_id], opening.now_s)
            found = reserve(standing, key.limits, opening.ask, opening.now_s)
            if not isinstance(found, Refusal):
                standing, grant = found
                rows.append({
                    "usage_id": opening.usage_id, "request_id": opening.request_id, "router_id": self._router_id,
                    "key_id": key.key_id, "tenant": key.tenant, "model": opening.model, "day": day_of(opening.now_s),
                    "arrived_s": opening.now_s, "num_held": grant.num_tokens, "num_charged": grant.num_charged,
                    } | _columns(NOTHING_USED))
            standings[key.key_id] = standing
            opened.append(Opened(found if isinstance(found, Refusal) else found[1], standing))
        if rows:
            connection.execute(REQUESTS.insert(), rows)
        return opened

    def _end(self, endings: Collection[Ending], standings: dict[str, Standing], connection: Connection) -> None:
        if not endings:
            return
        wanted = {ending.usage_id: ending for ending in endings}
        found = connection.execute(select(REQUESTS).where(REQUESTS.c.usage_id.in_(wanted))).mappings().all()
        rows = []
        for row in found:
            ending = wanted[row["usage_id"]]
            # One that was thought lost and was not is corrected by its router; nothing else ends twice.
            if row["outcome"] is not None and (row["outcome"] != Outcome.LOST or ending.outcome is Outcome.LOST):
                continue
            spent = Spent(row["arrived_s"], row["num_held"], row["num_charged"], ending.used.num_tokens,
                          was_open=row["outcome"] is None)
            standings[row["key_id"]] = settle(at(standings[row["key_id"]], ending.now_s), spent)
            rows.append({"of_id": row["usage_id"], "outcome": ending.outcome.value, "ended_s": ending.now_s,
                         "num_held": ending.used.num_tokens, "num_charged": ending.used.num_tokens
                         } | _columns(ending.used))
        if rows:
            connection.execute(update(REQUESTS).where(REQUESTS.c.usage_id == bindparam("of_id")), rows)

    def _save(self, standings: dict[str, Standing], connection: Connection) -> None:
        if standings:
            connection.execute(update(STANDINGS).where(STANDINGS.c.key_id == bindparam("of_key")),
                               [{"of_key": key_id} | _row_of(standing) for key_id, standing in standings.items()])


def _columns(used: Used) -> dict[str, object]:
    return {"num_prompt": used.num_prompt, "num_cached": used.num_cached, "num_generated": used.num_generated,
            "num_reasoning": used.num_reasoning, "first_token_s": used.first_token_s}


def _used(row: RowMapping) -> Used:
    return Used(row["num_prompt"], row["num_cached"], row["num_generated"], row["num_reasoning"],
                row["first_token_s"])


def _row_of(standing: Standing) -> dict[str, object]:
    """Both windows run on one clock, so that they share the number of their slot."""
    return {"slot": standing.requests.slot, "slot_requests": standing.requests.counts,
            "slot_tokens": standing.tokens.counts, "day": standing.day, "day_tokens": standing.day_tokens,
            "month": standing.month, "month_tokens": standing.month_tokens, "num_open": standing.num_open}


def _standing(row: RowMapping) -> Standing:
    return Standing(MinuteWindow(row["slot"], tuple(row["slot_requests"])),
                    MinuteWindow(row["slot"], tuple(row["slot_tokens"])), row["day"], row["day_tokens"], row["month"],
                    row["month_tokens"], row["num_open"])
