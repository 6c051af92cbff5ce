"""A database gets its schema once, whoever comes first, and what cannot be opened says why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine

from serving.tenants.database import DatabaseError, open_database, reading
from serving.tenants.migrations import (
    m0001_keys,
    m0002_usage,
    m0003_responses,
    m0004_usage_days,
    m0005_priority,
    m0006_files,
    m0007_batches,
    m0008_weight,
)
from serving.tenants.schema import METADATA

NEWEST = m0008_weight.revision


def test_migrations_lead_to_the_tables_that_the_code_knows(engine: Engine) -> None:
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert context.get_current_revision() == NEWEST
        steps = (m0001_keys, m0002_usage, m0003_responses, m0004_usage_days, m0005_priority, m0006_files, m0007_batches,
                 m0008_weight)
        assert [step.down_revision for step in steps] == [None, *(step.revision for step in steps[:-1])]
        assert compare_metadata(context, METADATA) == []


def test_several_may_open_a_new_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for engine in pool.map(open_database, [url] * 4):
            engine.dispose()


def test_a_database_of_a_newer_release_is_left_alone(url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseError, match="newer"):
        open_database(url)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:////proc/none/tenants.db",
                                 "postgresql://nobody@127.0.0.1:1/nothing"])
def test_what_cannot_be_opened_says_why(url: str) -> None:
    with pytest.raises(DatabaseError):
        open_database(url)


def test_a_file_of_keys_is_its_owners(tmp_path: Path) -> None:
    open_database(f"sqlite:///{tmp_path}/below/tenants.db").dispose()
    assert (tmp_path / "below" / "tenants.db").stat().st_mode & 0o077 == 0
