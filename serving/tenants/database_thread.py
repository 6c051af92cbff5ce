"""A thread of its own for what long texts and files ask of the database, so that keys and usage do not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from serving.errors import NotReadyError

T = TypeVar("T")


class DatabaseThread:
    def __init__(self, name: str, explain: Callable[[SQLAlchemyError], NotReadyError]) -> None:
        """`explain` makes the error that callers get when the database does not answer."""
        self._executor = ThreadPoolExecutor(1, name)
        self._explain = explain

    async def call(self, work: Callable[[], T]) -> T:
        """Return what `work` returns. Raises what it raises, and NotReadyError when the database does not answer."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except SQLAlchemyError as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """End it, once it has done what it was asked."""
        self._executor.shutdown()
