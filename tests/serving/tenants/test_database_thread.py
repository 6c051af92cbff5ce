"""Work on the database is done elsewhere, and its silence is an error that says so."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy.exc import OperationalError

from serving.batches.stores import _not_ready
from serving.errors import NotFoundError, NotReadyError
from serving.tenants.database_thread import DatabaseThread


async def test_it_returns_and_raises_what_work_does() -> None:
    thread = DatabaseThread("test", _not_ready)
    assert await thread.call(threading.get_ident) != threading.get_ident()

    def nothing() -> None:
        raise NotFoundError("none")

    def silent() -> None:
        raise OperationalError("SELECT 1", {}, Exception("no route"))
    with pytest.raises(NotFoundError):
        await thread.call(nothing)
    with pytest.raises(NotReadyError, match=r"does not answer: no route\. try again"):
        await thread.call(silent)
    thread.close()
