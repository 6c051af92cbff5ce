"""`moesaic keys create | list | revoke`: who may ask the model, and how much. Routers follow within seconds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.cli.surroundings import console, notes
from cluster.device.state_dir import STATE_DIR_VARIABLE, database_url, default_state_dir
from serving.config import AccessConfig, check_options
from serving.errors import InvalidRequestError
from serving.priority import DEFAULT_PRIORITY, MAX_PRIORITY, MAX_WEIGHT, MIN_PRIORITY
from serving.tenants.key import NAME_PATTERN, Key, Limits, Scope, hash_of, new_secret

if TYPE_CHECKING:
    from serving.tenants.key_store import KeyStore

keys_app = typer.Typer(no_args_is_help=True, help="API keys: make, list and revoke them. Routers follow within 5 s.")

DATABASE_VARIABLE = "MOESAIC_DATABASE"
Database = Annotated[str | None, typer.Option(
    envvar=DATABASE_VARIABLE, help="As access.database in the config  [default: SQLite in the state folder]")]
StateDir = Annotated[Path | None, typer.Option(envvar=STATE_DIR_VARIABLE, help="Where that is")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON array")]
AtLeastOne = Annotated[int | None, typer.Option(min=1)]
_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


@keys_app.command()
def create(name: Annotated[str, typer.Argument(help="For people: whose key it is, or what it is for")],
           tenant: Annotated[str | None, typer.Option(help="Who pays; keys may share one  [default: NAME]")] = None,
           scope: Annotated[list[Scope] | None, typer.Option(help="May be repeated  [default: infer]")] = None,
           expires: Annotated[str | None, typer.Option(help="After 30m, 12h or 90d  [default: never]")] = None,
           requests_per_minute: AtLeastOne = None, tokens_per_minute: AtLeastOne = None,
           tokens_per_day: AtLeastOne = None, tokens_per_month: AtLeastOne = None,
           concurrent_requests: AtLeastOne = None,
           max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer")] = None,
           priority: Annotated[int, typer.Option(min=MIN_PRIORITY, max=MAX_PRIORITY, help="The most urgent that it may "
                                                 "ask for: the lower the earlier")] = DEFAULT_PRIORITY,
           weight: Annotated[int | None, typer.Option(
               min=1, max=MAX_WEIGHT, help="Of the tenant, with all its keys, beside others: who has 2 is served twice "
                                           "as much while all wait  [default: as it has, else 1]")] = None,
           model: Annotated[list[str] | None, typer.Option(help="May be repeated  [default: all]")] = None,
           database: Database = None, state_dir: StateDir = None) -> None:
    """Make a key and print it. It is not kept: whoever loses it needs a new one."""
    now_s, (key_id, secret) = time.time(), new_secret()
    for what, value in (("name", name), ("tenant", tenant or name)):
        if not NAME_PATTERN.fullmatch(value):
            raise InvalidRequestError(f"{value[:80]!r} cannot be the {what} of a key",
                                      fix="use up to 64 letters, digits and . _ @ -, a letter or digit first")
    key = Key(key_id, name, tenant or name, hash_of(secret), frozenset(scope or [Scope.INFER]),
              Limits(requests_per_minute, tokens_per_minute, tokens_per_day, tokens_per_month, concurrent_requests,
                     max_tokens),
              priority, frozenset(model or ()), now_s, None if expires is None else now_s + _seconds_of(expires))
    with _store(database, state_dir) as store:
        store.add(replace(key, weight=weight or store.weight_of(key.tenant)))
    notes.print(f"key {key_id} of tenant {key.tenant}; it is shown this once:", highlight=False, markup=False)
    typer.echo(secret)


@keys_app.command(name="list")
def list_keys(as_json: AsJson = False, database: Database = None, state_dir: StateDir = None) -> None:
    """Show all keys, revoked and expired ones too, without their secrets."""
    with _store(database, state_dir) as store:
        now_s, found = time.time(), store.all()
    if as_json:
        typer.echo(json.dumps([_json_of(key, now_s) for key in found], indent=1))
        return
    table = Table("id", "name", "tenant", "weight", "scopes", "state", "expires", "limits", box=None)
    for key in found:
        limits = ", ".join(f"{name}={value}" for name, value in asdict(key.limits).items() if value is not None)
        table.add_row(key.key_id, key.name, key.tenant, str(key.weight), ",".join(sorted(key.scopes)),
                      _state_of(key, now_s), "never" if key.expires_s is None else _time_of(key.expires_s),
                      limits or "none")
    console.print(table)


@keys_app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="As `moesaic keys list` shows it")],
           database: Database = None, state_dir: StateDir = None) -> None:
    """End a key. Its open requests go on to their end."""
    with _store(database, state_dir) as store:
        is_done = store.revoke(key_id, time.time())
    if not is_done:
        raise InvalidRequestError(f"there is no valid key {key_id[:80]!r}", fix="see moesaic keys list")
    console.print(f"{key_id} is revoked", highlight=False)


@contextmanager
def _store(database: str | None, state_dir: Path | None) -> Iterator[KeyStore]:
    from serving.tenants.database import open_database
    from serving.tenants.key_store import KeyStore

    checked = check_options(AccessConfig, {"database": database}, "--database", "database")
    engine = open_database(database_url(checked.database, state_dir or default_state_dir()))
    yield KeyStore(engine)
    engine.dispose()


def _seconds_of(text: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if match is None:
        raise InvalidRequestError(f"{text[:80]!r} is not a time", fix="write for example 30m, 12h or 90d")
    return int(match[1]) * _SECONDS[match[2]]


def _state_of(key: Key, now_s: float) -> str:
    return "valid" if key.is_valid(now_s) else "expired" if key.revoked_s is None else "revoked"


def _time_of(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="minutes")


def _json_of(key: Key, now_s: float) -> dict[str, object]:
    return {"id": key.key_id, "name": key.name, "tenant": key.tenant, "scopes": sorted(key.scopes),
            "state": _state_of(key, now_s), "created_s": key.created_s, "expires_s": key.expires_s,
            "revoked_s": key.revoked_s, "priority": key.priority, "weight": key.weight, "models": sorted(key.models),
            "limits": asdict(key.limits)}
