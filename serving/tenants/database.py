"""Opens the database: SQLite in a file, or PostgreSQL by its URL. Brings its schema up to date."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from serving.errors import ServingError

logger = logging.getLogger(__name__)

_MIGRATIONS = Path(__file__).parent / "migrations"
_TIMEOUT_S = 5                  # to connect, and that one statement or a lock may take
_MIGRATION_LOCK = 7_204_531     # any number that others do not take


class DatabaseError(ServingError):
    """The database cannot be used. Its URL has no password, so it may be shown."""


def open_database(url: str) -> Engine:
    """Return the database with the newest schema; several processes may do so at once. Raises DatabaseError."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _open_sqlite(url)
    else:
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True,
            connect_args={"connect_timeout": _TIMEOUT_S, "options": f"-c statement_timeout={_TIMEOUT_S}s"})
    try:
        with engine.begin() as connection:
            _migrate(connection)
    except CommandError as error:
        engine.dispose()
        raise DatabaseError(f"the database {url} cannot be brought up to date: {error}",
                            fix="use the release that it was last used with, or a newer one") from error
    except (SQLAlchemyError, OSError) as error:
        engine.dispose()
        raise DatabaseError(f"the database {url} cannot be opened: {reason_of(error)}",
                            fix="check its URL, that the server answers, and that it lets this user in") from error
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that only reads, so that it keeps no writer waiting."""
    with engine.connect().execution_options(reads_only=True) as connection:
        yield connection


def reason_of(error: Exception) -> str:
    """Return the driver's own words, without the statement and its values."""
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def _open_sqlite(url: str) -> Engine:
    path = make_url(url).database
    if not path or path == ":memory:":
        raise DatabaseError(f"{url} names no file", fix="write sqlite:////var/lib/moesaic/tenants.db, for example")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch(mode=0o600)
    except OSError as error:
        raise DatabaseError(f"{path} cannot be written: {error.strerror}",
                            fix="name another file") from error
    engine = create_engine(url, connect_args={"timeout": _TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: object, entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None       # type: ignore[attr-defined]    # sqlite3's: transactions begin below
    cursor = connection.cursor()            # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")       # who reads and who writes do not wait for each other
    cursor.execute("PRAGMA synchronous=NORMAL")     # a power cut may lose the last moments, a kill nothing
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock first: a transaction that reads and then writes would fail where another wrote between."""
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    script = ScriptDirectory(str(_MIGRATIONS), version_locations=[str(_MIGRATIONS)])
    environment = EnvironmentContext(Config(), script, fn=lambda found, _: script._upgrade_revs("head", found))
    with environment:
        environment.configure(connection=connection)
        environment.run_migrations()
