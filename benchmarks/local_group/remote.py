"""Calls of an object's methods in another process, over a Unix socket: one connection a call, pickled values."""

from __future__ import annotations

import asyncio
import functools
import logging
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from cluster.coordinator.client import WATCH_S, CoordinatorApi, CoordinatorUnavailableError

logger = logging.getLogger(__name__)
_LENGTH_BYTES = 4
_CALL_TIMEOUT_S = 10.0      # beyond what a watch may wait


async def serve_object(target: object, path: Path) -> asyncio.Server:
    """Let others call `target`; a socket that a killed process left there is replaced."""
    if path.exists():       # noqa: ASYNC240     # a moment, before anything runs
        path.unlink()       # noqa: ASYNC240
    return await asyncio.start_unix_server(functools.partial(_answer, target), path)


def coordinator_at(path: Path) -> CoordinatorApi:
    """Return the coordinator that is served there; like a handle of Ray Serve it turns all that goes wrong into
    CoordinatorUnavailableError."""
    return cast(CoordinatorApi, RemoteObject(path))


class RemoteObject:
    """Has every method of the object that is served at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("__"):
            raise AttributeError(method)
        return functools.partial(self._call, method)

    async def _call(self, method: str, *arguments: object) -> object:
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S + (WATCH_S if method == "watch" else 0.0)):
                has_worked, answer = await self._ask(method, arguments)
        except (TimeoutError, OSError, EOFError) as error:
            raise CoordinatorUnavailableError(f"{method} was not answered: {error!r}") from error
        if not has_worked:
            raise CoordinatorUnavailableError(f"{method} failed: {answer}")
        return answer

    async def _ask(self, method: str, arguments: tuple[object, ...]) -> tuple[bool, object]:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(_framed((method, arguments)))
            return cast("tuple[bool, object]", await _read(reader))
        finally:
            writer.close()


async def _answer(target: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        method, arguments = await _read(reader)
        try:
            answer = (True, await getattr(target, method)(*arguments))
        except Exception as error:
            logger.exception("call_failed method=%s", method)
            answer = (False, str(error))
        writer.write(_framed(answer))
        await writer.drain()
    except (OSError, EOFError, asyncio.CancelledError):
        pass                        # the caller is gone, or this process ends
    finally:
        writer.close()


def _framed(value: object) -> bytes:
    content = pickle.dumps(value)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


async def _read(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
    return pickle.loads(await reader.readexactly(length))
