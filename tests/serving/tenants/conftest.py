"""Databases: a file, and a real PostgreSQL where its programs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from serving.tenants.database import open_database
from tests.deadlines import PATIENCE_S

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Yield the URL of a server that has no tables. Debian's packages refuse to run as root."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))        # a socket's path is short
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        subprocess.run([PROGRAMS[-1] / program, *arguments], user=user, cwd=folder, check=True, timeout=PATIENCE_S,
                       stdout=subprocess.DEVNULL)
    run("initdb", "-D", f"{folder}/db", "-A", "trust", "-U", "moesaic", "--no-sync")
    run("pg_ctl", "-D", f"{folder}/db", "-w", "-l", f"{folder}/log", "-o",
        f"-c listen_addresses='' -c fsync=off -k {folder}", "start")
    yield f"postgresql://moesaic@/postgres?host={folder}"
    run("pg_ctl", "-D", f"{folder}/db", "-m", "immediate", "-w", "stop")
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of an empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/tenants.db"
        return
    server: str = request.getfixturevalue("postgresql")
    admin = create_engine(server.replace("postgresql:", "postgresql+psycopg:"))
    with admin.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    admin.dispose()
    yield server


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    opened = open_database(url)
    yield opened
    opened.dispose()
