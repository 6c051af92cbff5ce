"""Old requests go, what they used stays, whoever archives them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select

from serving.tenants import usage_archive
from serving.tenants.database import reading
from serving.tenants.days import DAY_S
from serving.tenants.ledger import Ending, Ledger, Opening, Outcome, Used
from serving.tenants.schema import REQUESTS
from serving.tenants.standing import Ask
from serving.tenants.usage import Usage, read_usage
from serving.tenants.usage_archive import UsageArchive
from serving.tenants.usage_by import UsageBy
from tests.serving.tenants.keys import new_key

DAY = 20_785
KEEP_DAYS = 10


@pytest.fixture
def archives(engine: Engine) -> Iterator[list[UsageArchive]]:
    with ThreadPoolExecutor(3) as pool:
        yield [UsageArchive(engine, pool, lambda: (DAY + KEEP_DAYS + 1) * DAY_S + 7.0, KEEP_DAYS) for _ in range(3)]


def num_requests(engine: Engine) -> int:
    with reading(engine) as connection:
        return int(connection.execute(select(func.count()).select_from(REQUESTS)).scalar_one())


async def test_bills_stay_when_requests_go(engine: Engine, archives: list[UsageArchive],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_archive, "_AT_A_TIME", 4)
    ledger, keys = Ledger(engine, "r"), [new_key(name, "team")[0] for name in ("one", "two")]
    openings = [Opening(str(number), "r", keys[number % 2], "m", Ask(9, 9, 9), (DAY + number % 3) * DAY_S + 5.0)
                for number in range(30)]
    ledger.write(openings, [])
    ledger.write([], [Ending(one.usage_id, one.key.key_id, Outcome.FINISHED, Used(5, 2, 4, 1), one.now_s + 9.0)
                      for one in openings if one.usage_id != "0"])
    before = {by: read_usage(engine, by, (0, DAY + 9)) for by in UsageBy}
    assert before[UsageBy.TENANT] == [Usage("team", "", 30, 1, 145, 58, 116, 29)]
    await asyncio.gather(*(archive.archive() for archive in archives))
    assert num_requests(engine) == 21       # those of two days, and one that is open
    assert {by: read_usage(engine, by, (0, DAY + 9)) for by in UsageBy} == before
    ledger.write([], [Ending("0", keys[0].key_id, Outcome.FINISHED, Used(5, 2, 4, 1), DAY * DAY_S + 99.0)])
    await archives[0].archive()
    assert num_requests(engine) == 20
    assert read_usage(engine, UsageBy.TENANT, (0, DAY + 9)) == [Usage("team", "", 30, 0, 150, 60, 120, 30)]


async def test_a_database_that_is_away_is_asked_again_later(engine: Engine, archives: list[UsageArchive],
                                                            caplog: pytest.LogCaptureFixture) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE requests RENAME TO gone")
    await archives[0].archive()
    assert "usage_unarchived" in caplog.text
